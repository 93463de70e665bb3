"""Describing a checkpoint or an overlay for people, checking every header on the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rich.table import Table

from nexus_ray.checkpoints.byte_files import exists, locate
from nexus_ray.checkpoints.fingerprint import fingerprint, full_sha256
from nexus_ray.checkpoints.header import TensorEntry, dtype_name
from nexus_ray.checkpoints.overlay import CONFIG_FILE, STEM, load_overlay_config
from nexus_ray.checkpoints.reader import CheckpointReader, read_model_config
from nexus_ray.storage import Place


@dataclass(frozen=True)
class TypeTotals:
    """How much of a file is of one element type."""

    tensors: int
    elements: int
    bytes: int


def describe(directory: Place | str) -> Table:
    """A table of what a model directory or an overlay holds, by file and element type.

    Raises:
        ModelError: it is missing or incomplete, or a header or the index is damaged.
    """
    place = locate(directory)
    table = Table(title=str(directory), title_justify="left")
    for heading in ("file", "dtype", "tensors", "elements", "MB"):
        table.add_column(heading, justify="left" if heading in ("file", "dtype") else "right")
    for shard, totals in _totals(place).items():
        for number, (dtype, row) in enumerate(totals.items()):
            name = "" if number else shard
            table.add_row(name, dtype, f"{row.tensors:,}", f"{row.elements:,}", f"{row.bytes / 1e6:.1f}")
    return table


def identity(directory: Place | str, *, sha256: bool = False) -> list[str]:
    """Lines that identify a model or an overlay: the base's fingerprint and, on demand, `sha256sum`'s lines.

    Raises:
        ModelError: it is missing, incomplete or damaged.
        ArtefactError: an overlay's description is damaged.
    """
    place = locate(directory)
    if _stem(place) == STEM:
        lines = [_describe_overlay(place) if isinstance(place, Path) else "overlay"]
    else:
        lines = [f"{read_model_config(place).get('model_type', 'unknown')}, fingerprint {fingerprint(place)}"]
    if sha256:
        lines += [f"{digest}  {name}" for name, digest in full_sha256(place, stem=_stem(place)).items()]
    return lines


def _describe_overlay(directory: Path) -> str:
    config = load_overlay_config(directory)
    routers = {"none": "", "bias": " (biases of routers among them)", "all": " (routers among them)"}[config.routers]
    return (
        f"overlay of {config.parameters:,} parameters{routers} in {config.dtype}, "
        f"for the base {config.base_fingerprint}"
    )


def _stem(directory: Place) -> str:
    return STEM if exists(directory / CONFIG_FILE) else "model"


def _totals(directory: Place) -> dict[str, dict[str, TypeTotals]]:
    """{file name: {dtype: totals}} of the tensors that the checkpoint names."""
    with CheckpointReader(directory, stem=_stem(directory)) as reader:
        shards = {shard.name: list[TensorEntry]() for shard in reader.shards}
        for name in reader.names:
            shards[reader.shard(name).name].append(reader.entry(name))
    return {shard: _by_type(entries) for shard, entries in shards.items()}


def _by_type(entries: Iterable[TensorEntry]) -> dict[str, TypeTotals]:
    totals: dict[str, TypeTotals] = {}
    for entry in entries:
        old = totals.get(dtype_name(entry.dtype), TypeTotals(0, 0, 0))
        elements, size = old.elements + prod(entry.shape), old.bytes + entry.nbytes
        totals[dtype_name(entry.dtype)] = TypeTotals(old.tensors + 1, elements, size)
    return dict(sorted(totals.items()))
