"""How far two halves of the text lead to the same selection, and how often chance would do as much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import comb

import numpy as np

from nexus_ray.selection.scores import Floats, share_of


@dataclass(frozen=True)
class HalfRanking:
    """What one half of the text says: scores [experts] of those to choose from, and all of these, best first."""

    scores: Floats
    ranked: list[int]


@dataclass(frozen=True)
class Stability:
    """What the selections from two halves of the text say about each other.

    Attributes:
        overlap: fraction of the experts selected from one half that are selected from the other.
        p_value: probability that random selections have at least as many in common.
        held_out_share: share of the score that one half gives to the experts selected from the other, mean of both
            ways. Unlike the share of the selected in the text that selected them it is not raised by picking the
            largest of noisy scores: for exchangeable experts its expectation is top_k / experts.
    """

    overlap: float
    p_value: float
    held_out_share: float


def compare_halves(first: HalfRanking, second: HalfRanking, top_k: int) -> Stability:
    """Compare the best `top_k` of two halves.

    Their rankings should break ties in opposite directions: experts that a half cannot tell apart, such as those
    never used, would otherwise agree by their number alone.
    """
    chosen_first, chosen_second = first.ranked[:top_k], second.ranked[:top_k]
    common = len(set(chosen_first) & set(chosen_second))
    held_out = (share_of(second.scores, chosen_first) + share_of(first.scores, chosen_second)) / 2
    return Stability(common / top_k, overlap_p_value(common, top_k, len(first.ranked)), held_out)


def overlap_p_value(common: int, top_k: int, experts: int) -> float:
    """Probability that two random choices of `top_k` of `experts` have at least `common` experts in common.

    The number in common is hypergeometric: P(x) = C(K, x) C(E - K, K - x) / C(E, K).
    """
    ways = sum(_ways(top_k, experts)[common:])
    return ways / comb(experts, top_k)


def pooled_overlap_p_value(layers: Iterable[tuple[int, int, int]]) -> float:
    """Probability that random choices in several layers have at least as many experts in common altogether.

    The number in common is the sum of independent hypergeometric ones, so its distribution is their convolution.

    Args:
        layers: (experts in common, selected, to choose from) of each.
    """
    total, distribution = 0, np.ones(1)
    for common, top_k, experts in layers:
        total += common
        ways = comb(experts, top_k)
        distribution = np.convolve(distribution, [count / ways for count in _ways(top_k, experts)])
    return min(float(distribution[total:].sum()), 1.0)


def _ways(top_k: int, experts: int) -> list[int]:
    """In how many choices of `top_k` of `experts` are 0, 1, ... `top_k` of a given choice."""
    return [comb(top_k, same) * comb(experts - top_k, top_k - same) for same in range(top_k + 1)]
