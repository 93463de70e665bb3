"""Fixtures of the router tests: one expert with random weights, and a run whose experts are already ranked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.config import Config
from nexus_ray.families import ExpertWeights
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.packed_experts import ExpertNorms
from nexus_ray.router.artefact import Description, RouterStatistics
from nexus_ray.router.moments import RouterMoments
from nexus_ray.router.selection import Selection, select

LAYERS, EXPERTS, TOP_K, SEQUENCES, LENGTH = 2, 8, 2, 8, 64


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


def _moments(seed: int, *, with_norms: bool) -> RouterMoments:
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(LAYERS, EXPERTS, generator=generator)
    logits = torch.randn(SEQUENCES, LENGTH, LAYERS, EXPERTS, generator=generator) + bias
    valid = np.ones((SEQUENCES, LENGTH), bool)
    norms = []
    for layer in range(LAYERS):
        top = logits[:, :, layer].flatten(0, 1).topk(TOP_K)
        size = torch.randperm(EXPERTS, generator=generator)[top.indices] + 1.0
        norms.append(ExpertNorms(top.indices, size * top.values.softmax(dim=-1)))
    return RouterMoments.from_logits(logits, valid, np.arange(SEQUENCES) % 2, TOP_K, norms if with_norms else ())


@pytest.fixture
def ranked_run(
    make_micro_config: Callable[..., Config], micro_model: Path, tmp_path: Path
) -> Callable[..., tuple[Config, RunLayout, Selection]]:
    """A function (with_norms=True, **overrides) -> (config, layout, selection) of a run ready for `convert`.

    The statistics are of random router logits; everything after them is the real thing.
    """

    def make(*, with_norms: bool = True, **overrides: object) -> tuple[Config, RunLayout, Selection]:
        config = make_micro_config(tmp_path / "run", **overrides)
        layout = RunLayout(config.run.directory)
        sources = {name: _moments(seed, with_norms=with_norms) for seed, name in enumerate(config.data.sources)}
        description = Description(
            base_fingerprint=fingerprint(micro_model),
            tokenizer_sha256="none",
            sequence_length=LENGTH,
            layers=LAYERS,
            experts=EXPERTS,
            experts_per_token=TOP_K,
            tokens={name: moments.tokens for name, moments in sources.items()},
        )
        RouterStatistics(description, sources).save(layout.router_stats)
        return config, layout, select(config, layout)

    return make
