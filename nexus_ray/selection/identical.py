"""Finding layers whose experts all hold the same weights, such as those of a dense model that was just upcycled.

Whatever the router does there, every choice of experts gives the same shared expert, so no figure about the choice
means anything.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nexus_ray.checkpoints.reader import CheckpointReader, read_model_config
from nexus_ray.families import ExpertParts, StoredPart, family_of
from nexus_ray.storage import Place

_FIRST_ROWS = 8
_MOST_ROWS = 512  # of 2880 float32 values: 6 MB


def layers_of_identical_experts(path: Place) -> frozenset[int]:
    """The layers of the model at `path` in which every expert equals the first.

    Experts are compared as they are computed with, after dequantising. Reading stops at the first difference, which
    is within the first rows of two experts unless they are copies.

    Raises:
        ModelError: the model is missing, damaged or not of a supported family.
    """
    config = read_model_config(path)
    family = family_of(config)
    with CheckpointReader(path) as reader:
        layers = range(family.dimensions(config).layers)
        return frozenset(layer for layer in layers if experts_are_identical(family.expert_parts(reader, layer)))


def experts_are_identical(parts: ExpertParts) -> bool:
    """Whether all experts of a layer hold the same values; one expert alone does not count as a copy."""
    experts = parts.gate_up.experts
    if experts < 2:
        return False
    return all(_rows_agree(part, experts, start, stop) for part in parts for start, stop in _pieces(part.shape[0]))


def _rows_agree(part: StoredPart, experts: int, start: int, stop: int) -> bool:
    first = part.read_rows(0, start, stop)
    return all(torch.equal(first, part.read_rows(expert, start, stop)) for expert in range(1, experts))


def _pieces(rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cover an array: short at first, where different experts differ, then longer."""
    start, length = 0, _FIRST_ROWS
    while start < rows:
        stop = min(start + length, rows)
        yield start, stop
        start, length = stop, min(2 * length, _MOST_ROWS)
