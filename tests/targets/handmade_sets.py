"""Target sets written by pyarrow from random teachers: what a writer of the documented format would leave."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nexus_ray.targets.encoding.encodings import HiddenEncoding, OutputEncoding, SampledEncoding
from nexus_ray.targets.encoding.routers import RouterEncoding
from nexus_ray.targets.encoding.top_k import TopKEncoding
from nexus_ray.targets.format import Header, Manifest, TargetFile, shard_schema

LENGTH, VOCABULARY, HIDDEN, EXPERTS, SEPARATOR = 16, 50, 24, 8, 49
OUTPUTS: dict[str, OutputEncoding | None] = {
    "topk": TopKEncoding(k=5, vocabulary=VOCABULARY),
    "sampled": SampledEncoding(draws=7, vocabulary=VOCABULARY),
    "hidden": HiddenEncoding(hidden_size=HIDDEN),
    "float8": HiddenEncoding(hidden_size=HIDDEN, dtype="float8"),
    "none": None,
}
ROUTERS: dict[str, RouterEncoding | None] = {
    "logits": RouterEncoding(mode="logits", layers=(0, 1, 2), every=1, experts=EXPERTS, experts_per_token=2),
    "selected": RouterEncoding(
        mode="selected", layers=(0, 2), every=3, experts=EXPERTS, experts_per_token=2, temperature=1.0
    ),
    "none": None,
}


def make_header(output: str = "topk", router: str = "logits", **changes: object) -> Header:
    """A header with one of the encodings above."""
    values = {
        "base_fingerprint": "b" * 64,
        "compute": {"device": "cpu", "dtype": "float32", "experts": "reference"},
        "tokenizer_sha256": "a" * 64,
        "vocabulary": VOCABULARY,
        "sequence_length": LENGTH,
        "separator": SEPARATOR,
        "output": OUTPUTS[output],
        "router": ROUTERS[router],
    }
    return Header(**(values | changes))


@dataclass
class Row:
    """One sequence; columns of targets are [positions, width] uint8 tensors."""

    input_ids: list[int]
    loss_mask: list[bool]
    output: dict[str, torch.Tensor] = field(default_factory=dict)
    router: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_targets(self) -> int:
        return sum(self.loss_mask)


def random_sequence(header: Header, generator: np.random.Generator, *, masked: bool = False) -> Row:
    """Random tokens, often fewer than fit, and what a random teacher says about them."""
    count = int(generator.choice([2, 3, header.sequence_length, generator.integers(2, header.sequence_length + 1)]))
    shown = generator.random(count) < 0.6 if masked else np.ones(count, dtype=bool)
    sequence = Row(generator.integers(0, header.vocabulary, count).tolist(), [False, *(bool(s) for s in shown[1:])])
    if header.output is not None:
        sequence.output = _encode(header.output, sequence.num_targets, generator)
    if header.router is not None:
        shape = (header.router.positions(count), len(header.router.layers), header.router.experts)
        sequence.router = header.router.encode(_normal(generator, shape))
    return sequence


def _encode(encoding: OutputEncoding, positions: int, generator: np.random.Generator) -> dict[str, torch.Tensor]:
    if isinstance(encoding, HiddenEncoding):
        return encoding.encode(_normal(generator, (positions, encoding.hidden_size)))
    logits = 3 * _normal(generator, (positions, encoding.vocabulary))
    if isinstance(encoding, SampledEncoding):
        return encoding.encode(logits, torch.from_numpy(generator.random(positions)))
    return encoding.encode(logits)


def _normal(generator: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    flat = torch.from_numpy(generator.standard_normal(math.prod(shape), dtype=np.float32))
    return flat.view(shape)  # numpy gives empty arrays strides of zero, which torch does not view as bytes


@dataclass
class Part:
    """One shard: the sequences of a source."""

    source: str
    sequences: list[Row]
    output: bool = True
    router: bool = True


def write_shard(path: Path, header: Header, part: Part, row_group_rows: int = 2, statistics: bool = True) -> TargetFile:
    """Write one Parquet file; returns its entry in the manifest."""
    schema = shard_schema(header, part.source, output=part.output, router=part.router)
    rows = [_row(schema, part.source, index, sequence) for index, sequence in enumerate(part.sequences)]
    wanted = ["num_tokens", "num_targets"] if statistics else False
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, path, row_group_size=row_group_rows, write_statistics=wanted, compression="none")
    return TargetFile(
        name=path.name,
        source=part.source,
        text=f"{part.source}.jsonl",
        sequences=len(rows),
        tokens=sum(len(sequence.input_ids) for sequence in part.sequences),
        targets=sum(sequence.num_targets for sequence in part.sequences),
        output=part.output,
        router=part.router,
        **file_identity(path),
    )


def file_identity(path: Path) -> dict[str, object]:
    """Size and checksums, as the format's documentation has them."""
    content = path.read_bytes()
    blocks = [content[start : start + 2**18] for start in range(0, len(content), 2**18)]
    crcs = "".join(f"{zlib.crc32(block):08x}" for block in blocks)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "blocks": crcs}


def _row(schema: pa.Schema, source: str, index: int, sequence: Row) -> dict[str, object]:
    columns = sequence.output | sequence.router
    row: dict[str, object] = {
        "sequence_id": f"{source}/{'0' * 16}/{index}",
        "num_tokens": len(sequence.input_ids),
        "num_targets": sequence.num_targets,
        "input_ids": sequence.input_ids,
        "loss_mask": sequence.loss_mask,
    }
    return row | {name: columns[name].numpy().tobytes() for name in schema.names if name not in row}


def write_set(
    directory: Path, header: Header, parts: Sequence[Part], tokenizer: str = "missing", **options: int
) -> Manifest:
    """Write shards `a.parquet`, `b.parquet`, ... and their manifest."""
    directory.mkdir(parents=True, exist_ok=True)
    files = [
        write_shard(directory / f"{chr(ord('a') + index)}.parquet", header, part, **options)
        for index, part in enumerate(parts)
    ]
    manifest = Manifest(**header.model_dump(), tokenizer=tokenizer, files=tuple(files))
    save_manifest(directory, manifest)
    return manifest


def save_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`."""
    (directory / "manifest.json").write_text(json.dumps(manifest.model_dump(mode="json")))


def random_parts(header: Header, seed: int = 0, *, masked: bool = False) -> list[Part]:
    """Three sources: one with everything in two shards, one without routers, one of text only."""
    generator = np.random.default_rng(seed)

    def sequences(count: int) -> list[Row]:
        return [random_sequence(header, generator, masked=masked) for _ in range(count)]

    output, router = header.output is not None, header.router is not None
    return [
        Part("play", sequences(5), output, router),
        Part("prose", sequences(4), output, router=False),
        Part("play", sequences(3), output, router),
        Part("text", sequences(2), output=False, router=False),
    ]
