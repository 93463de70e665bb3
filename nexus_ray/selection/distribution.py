"""How a score is spread over the experts of a layer, in the terms of the reference system's analysis."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from nexus_ray.selection.scores import Floats, effective_experts, top_share

_TOP_COUNTS = (4, 8, 16, 32)
_PERCENTILES = (5, 25, 50, 75, 95)
_EVEN, _GRADED = 0.9, 0.5  # of all experts, the least that are effective


class Distribution(BaseModel):
    """How the score is spread over the experts of a layer. Shares are fractions of the layer's total score.

    Attributes:
        top_fractions: share of the best 4, 8, 16 and 32 experts, as far as there are more experts than that.
        percentiles: percentiles of the experts' shares.
        largest_gap: largest drop of share from one rank to the next.
        largest_gap_after: number of experts before that drop.
        effective_experts: exp of the entropy of the shares: as many equal experts would be as even.
        pattern: even, graded or concentrated, as at least 90 %, at least 50 % or fewer of all experts are effective.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_fractions: dict[str, float]
    percentiles: dict[str, float]
    largest_gap: float
    largest_gap_after: int
    effective_experts: float
    pattern: Literal["even", "graded", "concentrated"]


def describe_scores(scores: Floats) -> Distribution:
    """Statistics of one layer's scores [experts]."""
    experts = len(scores)
    shares = np.sort(scores)[::-1] / max(scores.sum(), np.finfo(np.float64).tiny)
    gaps = -np.diff(shares)
    effective = effective_experts(scores)
    return Distribution(
        top_fractions={str(count): top_share(scores, count) for count in _TOP_COUNTS if count < experts},
        percentiles={str(rank): float(np.percentile(shares, rank)) for rank in _PERCENTILES},
        largest_gap=float(gaps.max(initial=0.0)),
        largest_gap_after=int(gaps.argmax()) + 1 if len(gaps) else 1,
        effective_experts=effective,
        pattern=_pattern(effective / experts),
    )


def _pattern(effective_fraction: float) -> Literal["even", "graded", "concentrated"]:
    if effective_fraction >= _EVEN:
        return "even"
    return "graded" if effective_fraction >= _GRADED else "concentrated"
