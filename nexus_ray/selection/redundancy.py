"""Leaving out experts that say the same as a better one, and how many to take."""

from __future__ import annotations

import numpy as np

from nexus_ray.selection.scores import Floats

_ROUNDING = 1e-9  # of a share: shares that should reach the coverage may miss it by this


def correlations(covariance: Floats) -> Floats:
    """Correlation matrix [experts, experts] of a covariance; zero where an expert has no variance."""
    deviation = np.sqrt(np.clip(np.diag(covariance), 0.0, None))
    scale = np.outer(deviation, deviation)
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)


def pass_over_redundant(
    ranked: list[int], correlation: Floats, max_correlation: float | None
) -> tuple[list[int], list[int]]:
    """Reorder a ranking so that no prefix holds two strongly correlated experts, as far as there are others.

    Walking down the ranking, an expert whose correlation with one already kept is above `max_correlation` is passed
    over: it moves to the end, behind all that are kept. Experts that exclude each other (a negative correlation) are
    not redundant.

    Args:
        ranked: all experts, best first.
        correlation: [experts, experts] of the router probabilities.
        max_correlation: None keeps every expert.

    Returns:
        All experts, those passed over last, and those passed over; both keep the order of `ranked`.
    """
    if max_correlation is None:
        return ranked, []
    kept: list[int] = []
    passed_over: list[int] = []
    for expert in ranked:
        redundant = bool((correlation[expert, kept] > max_correlation).any())
        (passed_over if redundant else kept).append(expert)
    return kept + passed_over, passed_over


def count_for_coverage(scores: Floats, ranked: list[int], coverage: float) -> int:
    """The fewest experts, at least one, that have `coverage` of the score when taken in ranked order.

    Args:
        scores: [experts] of all experts.
        ranked: those to choose from, best first: coverage is a fraction of their score.
        coverage: above 0, at most 1.
    """
    ordered = scores[ranked]
    ordered = ordered if ordered.sum() > 0 else np.ones(len(ordered))
    shares = ordered.cumsum() / ordered.sum()
    return min(int(np.searchsorted(shares, coverage - _ROUNDING)) + 1, len(ordered))
