"""Fixture of the conversion tests: one expert with random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nexus_ray.families import ExpertWeights


@pytest.fixture
def random_weights() -> Callable[..., ExpertWeights]:
    """A function (hidden, width, seed) -> an expert in which every weight and bias matters."""

    def make(hidden: int = 12, width: int = 20, seed: int = 0) -> ExpertWeights:
        generator = torch.Generator().manual_seed(seed)
        return ExpertWeights(
            torch.randn(2 * width, hidden, generator=generator),
            torch.randn(2 * width, generator=generator),
            torch.randn(hidden, width, generator=generator),
            torch.randn(hidden, generator=generator),
        )

    return make
