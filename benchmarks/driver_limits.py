"""What one process does once a shard, a step or a file of text: where the design breaks first (docs/scaling.md).

No claim and no baseline: per-unit figures of the parts that no number of workers makes faster. Each is measured on
many synthetic units, so that `nexus_ray/planning/scale/figures.py` can multiply it. The last line printed is one JSON
object; seconds are of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from _common import command_line, memory_bytes, print_result
from _true_shape import SHAPES
from convert_true_shape import synthetic_statistics

from nexus_ray.config import DataSection, SelectSection
from nexus_ray.data.documents import refuse
from nexus_ray.data.shard_identity import text_identities
from nexus_ray.data.sources import describe_files, list_shards
from nexus_ray.router.moments import HALVES, RouterMoments
from nexus_ray.selection.figures.selection_figures import plot_selection
from nexus_ray.selection.selection import select_experts
from nexus_ray.targets.format import Header, Manifest, TargetFile
from nexus_ray.targets.reading.reader import TargetSet
from nexus_ray.targets.writing.shard_store import ShardStore
from nexus_ray.training.checkpointing import Snapshot, write_snapshot
from nexus_ray.training.feeding.order import SourceOrder

_SHAPE_120B = (36, 128)  # layers, experts
_ASSETS = Path(__file__).parents[1] / "assets"
_LINE = json.dumps({"text": "x" * 240}).encode() + b"\n"
_BLOCKS_A_FILE = 149  # of 256 KiB: 262,144 tokens of 149 bytes, from a MiB of text
_FILE_BYTES = _BLOCKS_A_FILE << 18
ResultT = TypeVar("ResultT")


def timed(compute: Callable[[], ResultT]) -> tuple[ResultT, float]:
    """(result, seconds)."""
    started = time.perf_counter()
    result = compute()
    return result, time.perf_counter() - started


def text(directory: Path, shards: int, size: int) -> dict[str, float]:
    """Hashing and listing text: by byte from one large file, by shard from many small shards."""
    large = directory / "large.jsonl"
    with large.open("wb") as file:
        for _ in range(size // (len(_LINE) * 4096)):
            file.write(_LINE * 4096)
    data = DataSection.model_validate({"sources": {"text": {"train": str(large)}}})
    size = large.stat().st_size
    timed(lambda: describe_files(data, "train"))  # into the page cache
    _, whole = timed(lambda: describe_files(data, "train"))
    cut = list_shards(data, "train")
    _, pieces = timed(lambda: text_identities(cut))
    small = DataSection.model_validate(
        {"sources": {"text": {"train": str(large)}}, "shard_bytes": max(1024, size // shards)}
    )
    many, listing = timed(lambda: list_shards(small, "train"))
    _, identities = timed(lambda: text_identities(many))
    large.unlink()
    return {
        "hash_file_bytes_per_second": size / whole,
        "hash_shards_bytes_per_second": size / pieces,
        "list_seconds_per_shard": listing / len(many),
        "identity_seconds_per_shard": max(0.0, identities - pieces) / len(many),
    }


def tokenise() -> dict[str, float]:
    """Tokenising and packing the embedded text on one core, with a tokenizer of fewer tokens than GPT-OSS's."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    from nexus_ray.data.packing import pack_shard

    tokenizer = AutoTokenizer.from_pretrained(_ASSETS / "tiny-gpt-oss")
    data = DataSection.model_validate({"sources": {"text": {"train": str(_ASSETS / "text" / "*.train.jsonl")}}})
    shards = list_shards(data, "train")
    tokens, seconds = timed(
        lambda: sum(packed.num_tokens for shard in shards for packed in pack_shard(shard, tokenizer, 1024, refuse))
    )
    return {"tokens_per_second_and_core": tokens / seconds}


def selection() -> dict[str, float]:
    """Ranking the experts of synthetic routers of 120B shape, and drawing and writing the report."""
    layers, experts = _SHAPE_120B
    statistics = synthetic_statistics(SHAPES["gpt-oss-120b"])
    section = SelectSection(method="pca", top_k=8)
    found, ranking = timed(lambda: select_experts(statistics, section, tuple(statistics.sources)))
    with tempfile.TemporaryDirectory() as place:
        _, drawing = timed(lambda: plot_selection(found, statistics, Path(place)))
    return {
        "rank_seconds_per_layer_and_expert2": ranking / layers / experts**2,
        "draw_seconds_per_layer": drawing / layers,
    }


def manifest(directory: Path, files: int) -> dict[str, float]:
    """Records, the manifest, and opening a target set of so many files."""
    header = Header(
        base_fingerprint=None, compute=None, tokenizer_sha256="0" * 64, vocabulary=201_088, sequence_length=1024,
        separator=0, output=None, router=None,
    )  # fmt: skip
    names = [f"general-{number:016x}.parquet" for number in range(files)]
    blocks = os.urandom(4 * _BLOCKS_A_FILE).hex()
    listed = tuple(_file(name, blocks) for name in names)
    store = ShardStore(directory)
    store.begin()
    for name in names:
        with store.path(name).open("wb") as file:
            file.truncate(_FILE_BYTES)  # a hole: nothing of it is read
    _, adding = timed(lambda: [store.add(file) for file in listed])
    done, looking = timed(lambda: store.done(names))
    if len(done) != files:
        raise SystemExit(f"{len(done)} of {files} shards are done")
    made = Manifest(**dict(header), tokenizer="here", files=listed)
    _, committing = timed(lambda: store.commit(made))
    before = memory_bytes("RssAnon")
    _, opening = timed(lambda: TargetSet.open(directory))
    return {
        "record_seconds_per_file": adding / files,
        "done_seconds_per_file": looking / files,
        "commit_seconds_per_file": committing / files,
        "manifest_bytes_per_file": (directory / "manifest.json").stat().st_size / files,
        "open_seconds_per_file": opening / files,
        "open_bytes_per_file": (memory_bytes("RssAnon") - before) / files,
    }


def _file(name: str, blocks: str) -> TargetFile:
    return TargetFile(
        name=name, source="general", text="data/general/train-00001.jsonl [1,048,576 to 2,097,152]", sequences=256,
        tokens=262_144, targets=261_888, output=True, router=False, bytes=_FILE_BYTES, sha256="0" * 64, blocks=blocks,
    )  # fmt: skip


def order(sequences: int) -> dict[str, float]:
    """Finding the sequences of an epoch's first step of one source: it is shuffled then, and kept."""
    source = SourceOrder(np.arange(sequences), 16, 16, 0, "general")
    source.held_out()
    _, seconds = timed(lambda: source.of_step(0))
    return {"order_seconds_per_sequence": seconds / sequences}


def moments(directory: Path, units: int) -> dict[str, float]:
    """Reading and merging what the units of `collect` left, at 120B shape."""
    layers, experts = _SHAPE_120B
    empty = RouterMoments.empty(layers, experts)
    one = RouterMoments(**{**empty.__dict__, "count": np.full(HALVES, 16_384)})
    path = directory / "unit.safetensors"
    one.save(path)
    merged, total = empty, 0.0
    for _ in range(units):
        merged, seconds = timed(lambda before=merged: before.merge(RouterMoments.load(path)))
        total += seconds
    return {"merge_seconds_per_unit_120b": total / units, "unit_bytes_120b": path.stat().st_size}


def checkpoint(directory: Path, size: int) -> dict[str, float]:
    """Writing a recovery checkpoint, checksum and all, by one process."""
    snapshot = Snapshot({"parameter": torch.ones(size // 4)}, {"step": 1})
    _, seconds = timed(lambda: write_snapshot(directory / "step", snapshot))
    return {"checkpoint_bytes_per_second": size / seconds}


def pool(items: int) -> dict[str, float]:
    """Handing work to a pool of actors through Ray Data: the part of a stage that grows with its units."""
    from nexus_ray.cluster import ensure_ray, map_over_pool
    from nexus_ray.config import ResourcesSection

    started = time.perf_counter()
    ensure_ray()
    initialised = time.perf_counter() - started

    def run(count: int) -> float:
        rows = [{"number": number} for number in range(count)]
        return timed(lambda: sum(1 for _ in map_over_pool(_Echo, {}, rows, ResourcesSection(workers=2), "echo")))[1]

    few, many = run(8), run(items)
    return {
        "ray_start_seconds": initialised,
        "pool_start_seconds": few,
        "pool_seconds_per_item": (many - few) / (items - 8),
        "driver_bytes_per_item": 0.0 if not items else memory_bytes("RssAnon") / items,
    }


class _Echo:
    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return row


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shards", type=int, default=100_000, help="synthetic shards of text (default 100,000)")
    parser.add_argument("--files", type=int, default=20_000, help="files of a target set (default 20,000)")
    parser.add_argument("--sequences", type=int, default=5_000_000, help="sequences of a source (default 5 million)")
    parser.add_argument("--items", type=int, default=2000, help="units of a pool; 0 starts no Ray (default 2,000)")
    arguments = parser.parse_args()
    with command_line(), tempfile.TemporaryDirectory(prefix="driver-limits-") as temporary:
        directory = Path(temporary)
        result: dict[str, float] = text(directory, arguments.shards, 512 << 20) | tokenise() | selection()
        result |= manifest(directory / "targets", arguments.files)
        result |= order(arguments.sequences)
        result |= moments(directory, 20)
        result |= checkpoint(directory, 1 << 30)
        if arguments.items:
            result |= pool(arguments.items)
        counts = {"shards": arguments.shards, "files": arguments.files, "sequences": arguments.sequences}
        print_result(counts | {"items": arguments.items, "cores": os.cpu_count()} | result)


if __name__ == "__main__":
    main()
