"""Selections of any size whose numbers are drawn, not computed: for tests of what is made from them."""

from __future__ import annotations

import numpy as np

from nexus_ray.data.coverage import CalibrationSample
from nexus_ray.router.accumulate import moments_of_logits
from nexus_ray.router.artefact import Description, RouterStatistics
from nexus_ray.selection.distribution import describe_scores
from nexus_ray.selection.record import LayerSelection, Selection, SourceUse
from nexus_ray.selection.scores import cumulative_shares

SOURCES = ("play", "prose", "code")
SIZES = [(1, 2, 1), (6, 16, 8), (24, 32, 8), (36, 128, 24)]  # layers, experts, selected
REASON = "Two halves of the text agree on {common} of {count} experts. They hold {share:.1f} % of the score."


def sample(tokens: int, **changes: object) -> CalibrationSample:
    values = {"method": "coverage", "candidates": 800, "candidate_tokens": 204800, "sequences": tokens // 256}
    figures = {"coverage": 2100.0, "random_coverage": 2000.0, "reference_coverage": 1750.0}
    return CalibrationSample.model_validate(
        values | figures | {"tokens": tokens, "distinct_tokens": 3500} | changes,
    )


def source_use(usage: np.ndarray, count: int, overlap: float | None) -> SourceUse:
    order = np.argsort(-usage, kind="stable")[:count]
    return SourceUse(usage=tuple(usage), selected=tuple(int(e) for e in order), split_half_overlap=overlap)


def layer_selection(
    seed: int, experts: int, count: int, sources: tuple[str, ...] = SOURCES, **changes: object
) -> LayerSelection:
    """One layer; `changes` replace its fields."""
    generator = np.random.default_rng(seed)
    scores = np.sort(generator.dirichlet(np.full(experts, 0.5)))[::-1]
    null = cumulative_shares(generator.dirichlet(np.full(experts, 2.0)))
    spectrum = np.sort(generator.dirichlet(np.full(experts, 0.3)))[::-1]
    ranked = generator.permutation(experts)
    share = float(scores[:count].sum())
    overlap = round(0.9 * count) / count
    values = {
        "ranked": ranked.tolist(),
        "scores": scores.tolist(),
        "selected": ranked[:count].tolist(),
        "passed_over": [],
        "share": share,
        "null_share": float(null[count - 1]),
        "null_share_high": float(null[count - 1]) + 0.02,
        "held_out_share": share - 0.01,
        "null_curve": null.tolist(),
        "split_half_overlap": overlap,
        "chance_overlap": count / experts,
        "overlap_p_value": 0.001,
        "verdict": "stable",
        "cause": "agreement",
        "reason": REASON.format(common=round(overlap * count), count=count, share=100 * share),
        "explained_variance_ratio": spectrum.tolist(),
        "null_explained_variance_ratio": np.sort(generator.dirichlet(np.full(experts, 2.0)))[::-1].tolist(),
        "total_variance": 0.1 + 0.01 * seed,
        "usage": generator.dirichlet(np.ones(experts)).tolist(),
        "by_source": {name: source_use(generator.dirichlet(np.ones(experts)), count, 0.9) for name in sources},
        "reap": None,
        "distribution": describe_scores(scores, null),
    }
    return LayerSelection.model_validate(values | changes)


def make_selection(layers: list[LayerSelection], **changes: object) -> Selection:
    """A selection of these layers; `changes` replace its fields."""
    sources = tuple(layers[0].by_source)
    values = {
        "base_fingerprint": "base",
        "method": "pca",
        "top_k": len(layers[0].selected),
        "coverage": None,
        "max_correlation": None,
        "components": 20,
        "sources": sources[:1],
        "tokens": {name: 4096 * (index + 1) for index, name in enumerate(sources)},
        "calibration": {name: sample(4096 * (index + 1)) for index, name in enumerate(sources)},
        "num_experts": len(layers[0].ranked),
        "pooled_overlap_p_value": 1e-6,
        "expected_above_null": 0.05 * sum(layer.judged for layer in layers),
        "layers": tuple(layers),
    }
    return Selection.model_validate(values | changes)


def synthetic_selection(layers: int = 6, experts: int = 16, count: int = 8, **changes: object) -> Selection:
    """A selection of `layers` layers; `changes` replace fields of every layer."""
    return make_selection([layer_selection(seed, experts, count, **changes) for seed in range(layers)])


def synthetic_statistics(selection: Selection, experts_per_token: int = 4) -> RouterStatistics:
    """Statistics of random router logits, of the selection's shape."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (4, 64, len(selection.layers), selection.num_experts)
    per_token = min(experts_per_token, selection.num_experts)
    moments = moments_of_logits(
        torch.randn(shape, generator=generator), np.ones(shape[:2], bool), np.arange(4) % 2, per_token
    )
    description = Description(
        base_fingerprint="base",
        tokenizer_sha256="none",
        sequence_length=64,
        layers=moments.layers,
        experts=moments.experts,
        experts_per_token=per_token,
        tokens=selection.tokens,
    )
    return RouterStatistics(description, dict.fromkeys(selection.tokens, moments))
