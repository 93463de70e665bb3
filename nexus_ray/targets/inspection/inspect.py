"""What a target set holds, as data: facts in words, totals by source, stored bytes by column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nexus_ray.targets.encoding.encodings import HiddenEncoding, OutputEncoding, SampledEncoding
from nexus_ray.targets.encoding.routers import RouterEncoding
from nexus_ray.targets.format import Manifest, TargetFile
from nexus_ray.targets.reading.reader import TargetSet

PARQUET = "(Parquet)"  # stands for the bytes of the files that are no column's
_IDENTITY = 12  # digits of a digest


@dataclass(frozen=True)
class SourceTotals:
    """The shards of one source together; tokens and targets of all sequences, bytes of the files."""

    source: str
    shards: int
    sequences: int
    tokens: int
    targets: int
    bytes: int
    output: bool
    router: bool
    unreadable: int
    unreadable_example: str


@dataclass(frozen=True)
class ColumnSize:
    """Bytes of a column as they are stored, and the tokens of the shards that have it."""

    name: str
    bytes: int
    tokens: int


def facts(manifest: Manifest) -> dict[str, str]:
    """What the manifest says about all shards, in words."""
    compute = ", ".join(f"{name} {value}" for name, value in (manifest.compute or {}).items())
    base = manifest.base_fingerprint
    return {
        "output targets": _of_output(manifest.output),
        "router targets": _of_router(manifest.router),
        "base model": f"{base[:_IDENTITY]} ({compute})" if base else "none",
        "tokenizer": f"{manifest.tokenizer_sha256[:_IDENTITY]}, in {manifest.tokenizer} when the set was made",
        "sequences": f"up to {manifest.sequence_length:,} tokens of a vocabulary of {manifest.vocabulary:,}",
        "format": f"{manifest.format_version}",
    }


def by_source(manifest: Manifest) -> list[SourceTotals]:
    """Totals of each source, in the order of the manifest."""
    sources = dict.fromkeys(file.source for file in manifest.files)
    return [_totals(source, [file for file in manifest.files if file.source == source]) for source in sources]


def by_column(targets: TargetSet) -> list[ColumnSize]:
    """Sizes of all columns, from the footers of all shards, and of what Parquet adds.

    Raises:
        ArtefactError: a footer is damaged.
        StorageError: one cannot be read.
    """
    sizes: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for shard in targets.shards:
        stored = _stored_bytes(shard.parquet.metadata)
        shard.close()
        for name, size in (stored | {PARQUET: shard.file.bytes - sum(stored.values())}).items():
            sizes[name] = sizes.get(name, 0) + size
            tokens[name] = tokens.get(name, 0) + shard.file.tokens
    ordered = [*(name for name in sizes if name != PARQUET), *(name for name in sizes if name == PARQUET)]
    return [ColumnSize(name, sizes[name], tokens[name]) for name in ordered]


def _stored_bytes(metadata: Any) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            column = row_group.column(index)
            name = column.path_in_schema.partition(".")[0]
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes


def _totals(source: str, files: Sequence[TargetFile]) -> SourceTotals:
    return SourceTotals(
        source=source,
        shards=len(files),
        sequences=sum(file.sequences for file in files),
        tokens=sum(file.tokens for file in files),
        targets=sum(file.targets for file in files),
        bytes=sum(file.bytes for file in files),
        output=any(file.output for file in files),
        router=any(file.router for file in files),
        unreadable=sum(file.unreadable for file in files),
        unreadable_example=next((file.unreadable_example for file in files if file.unreadable), ""),
    )


def _of_output(encoding: OutputEncoding | None) -> str:
    if encoding is None:
        return "none: tokens only"
    width = f"{sum(encoding.widths().values()):,} bytes a position before compression"
    if isinstance(encoding, HiddenEncoding):
        return f"hidden: {encoding.hidden_size:,} numbers in {encoding.dtype}, {width}"
    temperature = f"temperature {encoding.temperature:g}"
    if isinstance(encoding, SampledEncoding):
        return f"sampled: {encoding.draws:,} draws, {temperature}, {width}"
    values = f"{encoding.value_bits} bits a log-probability"
    return f"topk: the {encoding.k:,} most likely tokens and the mass of the rest, {values}, {temperature}, {width}"


def _of_router(encoding: RouterEncoding | None) -> str:
    if encoding is None:
        return "none"
    what = f"logits of all {encoding.experts} experts"
    if encoding.mode == "selected":
        chosen = f"the {encoding.experts_per_token} selected of {encoding.experts} experts and the mass of the rest"
        what = f"{chosen}, temperature {encoding.temperature:g}"
    positions = "every position" if encoding.every == 1 else f"one position in {encoding.every}"
    width = f"{sum(encoding.widths().values()):,} bytes a position before compression"
    return f"{encoding.mode}: {what}; layers {_ranges(encoding.layers)}; {positions}, {width}"


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with the runs among them as "first-last"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
