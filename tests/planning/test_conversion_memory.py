"""The memory of making one layer, by formula and as torch's allocator counted it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nexus_ray.config import Config
from nexus_ray.conversion.alignment import aligned_mean
from nexus_ray.families import ExpertWeights
from nexus_ray.planning.conversion import convert_needs
from nexus_ray.planning.sizes import read_sizes
from nexus_ray.planning.worker import Worker

_HIDDEN, _WIDTH = 320, 256


def _expert(seed: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2 * _WIDTH, _HIDDEN), (2 * _WIDTH,), (_HIDDEN, _WIDTH), (_HIDDEN,)]
    return ExpertWeights(*(torch.randn(shape, generator=generator) for shape in shapes))


def test_aligning_experts(
    micro_config: Callable[..., Config],
    micro_model: Path,
    most_allocated: Callable[[Callable[[], object]], int],
    tmp_path: Path,
) -> None:
    measured = most_allocated(lambda: aligned_mean(_expert(seed) for seed in range(4)))
    sizes = read_sizes(micro_model)
    dimensions = dataclasses.replace(sizes.dimensions, hidden_size=_HIDDEN, intermediate_size=_WIDTH)
    config = micro_config(tmp_path, **{"convert.initialisation": "aligned_top4"})
    needs = convert_needs(Worker.of(config, dataclasses.replace(sizes, dimensions=dimensions)))
    planned = {part.name: part.size for part in needs.peak.parts}["one layer"]
    assert planned == pytest.approx(measured, rel=0.15)
