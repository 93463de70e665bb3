"""Choosing calibration sequences that cover the vocabulary within a budget of tokens.

Router statistics of a small sample are blind to whatever the sample lacks. The coverage of a set S of sequences is
F(S) = sum over tokens t of sqrt(count of t in S): a token that is missing is worth more than one more "the". The
square root is concave, so F is monotone and submodular (concave over modular: Lin & Bilmes 2011, "A Class of
Submodular Functions for Document Summarization"), and greedy choice comes with a guarantee.

Random choice and the reference system's score stand beside it, so that a report can say what the choice is worth.
All three follow one rule for the budget (`token_counts`).
"""

from __future__ import annotations

import heapq
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from nexus_ray.data.reference_choice import choose_like_reference
from nexus_ray.data.token_counts import TokenCounts, choose_randomly, permutation

__all__ = [
    "CalibrationSample",
    "TokenCounts",
    "choose_by_coverage",
    "choose_like_reference",
    "choose_randomly",
    "coverage",
    "describe_sample",
]

Method = Literal["coverage", "random"]

_RANDOM_DRAWS = 5
_REFERENCE_ROUNDS = 32
_TIE_DIGITS = 12  # gains a token that agree to this many decimals are ties, whatever order they were summed in


class CalibrationSample(BaseModel):
    """How the calibration sequences of a source were chosen, and what that is worth.

    Attributes:
        method: "coverage" or "random".
        candidates: sequences to choose from.
        candidate_tokens: their tokens.
        sequences: sequences chosen.
        tokens: their tokens.
        distinct_tokens: vocabulary entries that occur in them.
        coverage: sum over the vocabulary of sqrt(count) in the chosen sequences.
        random_coverage: the same for random choice at the same budget, mean of five draws.
        reference_coverage: the same for the reference system's score at the same budget.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method
    candidates: int
    candidate_tokens: int
    sequences: int
    tokens: int
    distinct_tokens: int
    coverage: float
    random_coverage: float
    reference_coverage: float


def coverage(counts: TokenCounts, chosen: NDArray[np.int64]) -> float:
    """Sum over the vocabulary of sqrt(occurrences in the chosen candidates)."""
    return float(np.sqrt(counts.totals(chosen)).sum())


def choose_by_coverage(counts: TokenCounts, budget: int, seed: int) -> NDArray[np.int64]:
    """Greedily choose the candidate that adds most coverage a token, until none that is left fits.

    For candidates of equal length the coverage is at least 1 - 1/e of the best that any choice reaches (Nemhauser,
    Wolsey & Fisher 1978). For unequal ones it is at least half of that, because a single candidate that covers more
    than the whole greedy choice takes its place (Leskovec et al. 2007, "Cost-effective Outbreak Detection in
    Networks", with the single candidate of Khuller, Moss & Naor 1999 as the alternative).

    Args:
        counts: the candidates.
        budget: tokens to choose at most; more only when the shortest candidate is longer.
        seed: of the permutation that decides between candidates of equal gain.

    Returns:
        Numbers of the chosen candidates, in order of choice.
    """
    budget = counts.affordable(budget)
    rank = permutation(counts, seed)
    alone = counts.sums(np.sqrt(counts.counts))
    greedy = _lazy_greedy(counts, budget, rank, alone)
    alone[counts.lengths > budget] = 0
    best = int(np.lexsort((rank, -alone))[0]) if len(counts) else 0
    if len(greedy) and alone[best] > coverage(counts, greedy):
        return _lazy_greedy(counts, budget, rank, alone, first=best)
    return greedy


def describe_sample(
    counts: TokenCounts, chosen: NDArray[np.int64], budget: int, method: Method, seed: int
) -> CalibrationSample:
    """What was chosen, beside random choice and the reference's score at the same budget.

    Args:
        counts: the candidates.
        chosen: numbers of the chosen ones.
        budget: tokens that were allowed.
        method: how they were chosen.
        seed: they were chosen with; the random draws use the seeds after it.
    """
    draws = [choose_randomly(counts, budget, seed + 1 + draw) for draw in range(_RANDOM_DRAWS)]
    return CalibrationSample(
        method=method,
        candidates=len(counts),
        candidate_tokens=int(counts.lengths.sum()),
        sequences=len(chosen),
        tokens=int(counts.lengths[chosen].sum()),
        distinct_tokens=int(np.count_nonzero(counts.totals(chosen))),
        coverage=coverage(counts, chosen),
        random_coverage=float(np.mean([coverage(counts, draw) for draw in draws])),
        reference_coverage=coverage(counts, choose_like_reference(counts, budget, _REFERENCE_ROUNDS)),
    )


def _lazy_greedy(
    counts: TokenCounts,
    budget: int,
    rank: NDArray[np.int64],
    alone: NDArray[np.float64],
    first: int | None = None,
) -> NDArray[np.int64]:
    """Cost-benefit greedy choice that scores a candidate only when its bound says it could be the best.

    A gain only falls while the choice grows, so the gain that was last computed bounds it (Minoux 1978, "Accelerated
    greedy algorithms for maximizing submodular set functions").
    """
    covered = _Covered(counts)
    chosen: list[int] = []
    heap = _bounds(counts, rank, alone)
    if first is not None:
        chosen.append(first)
        budget -= covered.add(first)
        heap = [entry for entry in heap if entry[2] != first]
    heapq.heapify(heap)
    while heap:
        _, place, candidate = heapq.heappop(heap)
        if counts.lengths[candidate] > budget:
            continue
        entry = (-covered.gain_a_token(candidate), place, candidate)
        if heap and heap[0] < entry:
            heapq.heappush(heap, entry)
            continue
        chosen.append(candidate)
        budget -= covered.add(candidate)
    return np.asarray(chosen, dtype=np.int64)


def _bounds(counts: TokenCounts, rank: NDArray[np.int64], alone: NDArray[np.float64]) -> list[tuple[float, int, int]]:
    """(-gain a token, rank, number) of the candidates that hold tokens, for a heap whose top is the best."""
    holding = np.flatnonzero(counts.lengths)
    gains = np.round(alone[holding] / counts.lengths[holding], _TIE_DIGITS)
    return list(zip((-gains).tolist(), rank[holding].tolist(), holding.tolist(), strict=True))


class _Covered:
    """Occurrences of each token in what was chosen so far, and their roots."""

    def __init__(self, counts: TokenCounts) -> None:
        self._counts = counts
        self._totals = np.zeros(counts.vocabulary)
        self._roots = np.zeros(counts.vocabulary)

    def gain_a_token(self, candidate: int) -> float:
        """Coverage the candidate would add, over its length."""
        tokens, occurrences = self._counts.entries(candidate)
        gain = (np.sqrt(self._totals[tokens] + occurrences) - self._roots[tokens]).sum()
        return round(float(gain) / int(self._counts.lengths[candidate]), _TIE_DIGITS)

    def add(self, candidate: int) -> int:
        """Choose the candidate; its tokens."""
        tokens, occurrences = self._counts.entries(candidate)
        self._totals[tokens] += occurrences
        self._roots[tokens] = np.sqrt(self._totals[tokens])
        return int(self._counts.lengths[candidate])
