"""How a score is spread over the experts of a layer, in the terms of the reference system's analysis.

The labels are the reference's (NEXUS v0.1.0), made for 128 experts. A layer of 16 experts reaches a high share with
four of them by having few, so each label stands beside the one that the null model gets for the same layer.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from nexus_ray.selection.scores import Floats, effective_experts, top_share

Pattern = Literal["steep cliff", "moderate concentration", "gradual decline", "even distribution"]
_TOP_COUNTS = (4, 8, 16, 32)
_PERCENTILES = (50, 75, 90, 95, 99)
_PATTERN_EXPERTS = 4


class Distribution(BaseModel):
    """How the score is spread over the experts of a layer.

    Attributes:
        top_fractions: share of the layer's total score that the best 4, 8, 16 and 32 experts have, as far as there
            are more experts than that.
        percentiles: of the experts' scores: the 50th, 75th, 90th, 95th and 99th.
        largest_gap: largest drop of the score from one rank to the next.
        largest_gap_after: number of experts before that drop.
        effective_experts: exp of the entropy of the shares: as many equal experts would be as even.
        pattern: by the share of the best four experts: above 0.7 a steep cliff, above 0.5 moderate concentration,
            above 0.35 a gradual decline, else an even distribution.
        null_pattern: the label of the null model's mean share of the best four.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_fractions: dict[str, float]
    percentiles: dict[str, float]
    largest_gap: float
    largest_gap_after: int
    effective_experts: float
    pattern: Pattern
    null_pattern: Pattern


def describe_scores(scores: Floats, null_curve: Floats) -> Distribution:
    """Statistics of one layer's scores [experts], with the null model's cumulative shares [experts] by rank."""
    experts = len(scores)
    gaps = -np.diff(np.sort(scores)[::-1])
    return Distribution(
        top_fractions={str(count): top_share(scores, count) for count in _TOP_COUNTS if count < experts},
        percentiles={str(rank): float(np.percentile(scores, rank)) for rank in _PERCENTILES},
        largest_gap=float(gaps.max(initial=0.0)),
        largest_gap_after=int(gaps.argmax()) + 1 if len(gaps) else 1,
        effective_experts=effective_experts(scores),
        pattern=pattern_label(top_share(scores, _PATTERN_EXPERTS)),
        null_pattern=pattern_label(float(null_curve[min(_PATTERN_EXPERTS, experts) - 1])),
    )


def pattern_label(share: float) -> Pattern:
    """The reference's label for the share of the score that the best four experts have."""
    if share > 0.7:
        return "steep cliff"
    if share > 0.5:
        return "moderate concentration"
    return "gradual decline" if share > 0.35 else "even distribution"
