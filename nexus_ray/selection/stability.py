"""How far two halves of the text lead to the same selection, and how often chance would do as much."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from nexus_ray.selection.scores import Floats, share_of


@dataclass(frozen=True)
class HalfRanking:
    """What one half of the text says: scores [experts], and all experts, best first."""

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
    ways = sum(comb(top_k, same) * comb(experts - top_k, top_k - same) for same in range(common, top_k + 1))
    return ways / comb(experts, top_k)
