"""The reference system's choice of calibration sequences: a baseline for reports.

NEXUS v0.1.0 draws the sample's token distribution towards that of the whole pool and adds a bonus for length, which
dominates. Scoring one candidate there walks the whole vocabulary; here a round costs the tokens of the candidates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nexus_ray.data.token_counts import TokenCounts, take_while_fitting

_EPSILON = 1e-10
_LENGTH_BONUS = 0.01  # nats a token


def choose_like_reference(counts: TokenCounts, budget: int, rounds: int | None = None) -> NDArray[np.int64]:
    """Choose by the score of the reference system (NEXUS v0.1.0): a baseline.

    A candidate scores -KL(P || Q) + 0.01 x its tokens, in nats: P is the distribution of tokens in what was chosen
    so far and the candidate, Q that of all candidates, both with 1e-10 added to each count. The best score is taken,
    the lower number among equals. The budget follows the rule of `token_counts`, so that choices can be compared; the
    reference itself goes past the budget with its last pick.

    Args:
        counts: the candidates.
        budget: tokens to choose at most; more only when the shortest candidate is longer.
        rounds: None scores every candidate again for each pick. Otherwise the best N of a round are taken together,
            as with the reference's `batch_select`, where N is such that candidates of mean length fill the budget in
            this many rounds.

    Returns:
        Numbers of the chosen candidates, in order of choice.
    """
    left = budget = counts.affordable(budget)
    a_round = 1 if rounds is None else _picks_a_round(counts, budget, rounds)
    score = _Score(counts)
    free = counts.lengths > 0
    picks: list[NDArray[np.int64]] = []
    while (free & (counts.lengths <= left)).any():
        scores = np.where(free & (counts.lengths <= left), score.of_all(), -np.inf)
        best = np.argsort(-scores, kind="stable")[:a_round]
        taken = take_while_fitting(counts.lengths, best[np.isfinite(scores[best])], left)
        score.add(taken)
        free[taken] = False
        left -= int(counts.lengths[taken].sum())
        picks.append(taken)
    return np.concatenate([np.zeros(0, dtype=np.int64), *picks])


def _picks_a_round(counts: TokenCounts, budget: int, rounds: int) -> int:
    """Candidates of mean length that fill the budget, over the rounds, rounded up."""
    total = int(counts.lengths.sum())
    return max(1, -(-budget * len(counts) // (total * rounds))) if total else 1


class _Score:
    """The reference's score of all candidates at once.

    With counts a_t = chosen + candidate + epsilon and M their sum, KL = sum_t a_t log(a_t / q_t) / M - log M. Only
    the tokens of a candidate change the sum, so a round costs the entries of the pool, not candidates x vocabulary.
    """

    def __init__(self, counts: TokenCounts) -> None:
        self._counts = counts
        pool = counts.totals(np.arange(len(counts)))
        self._present = pool > 0
        self._smoothing = _EPSILON * np.count_nonzero(self._present)
        smoothed = np.where(self._present, pool + _EPSILON, 1.0)
        self._log_pool = np.log(smoothed / (pool.sum() + self._smoothing))
        self._cross = counts.sums(counts.counts * self._log_pool[counts.tokens])
        self._totals = np.zeros(counts.vocabulary)

    def of_all(self) -> NDArray[np.float64]:
        """[candidates] score of each one as the next pick, in nats."""
        counts = self._counts
        here = _times_log(self._totals + _EPSILON)
        with_candidate = _times_log(self._totals[counts.tokens] + counts.counts + _EPSILON)
        chosen = (here - (self._totals + _EPSILON) * self._log_pool)[self._present].sum()
        weighted = chosen + counts.sums(with_candidate - here[counts.tokens]) - self._cross
        mass = self._totals.sum() + counts.lengths + self._smoothing
        return np.log(mass) - weighted / mass + _LENGTH_BONUS * counts.lengths

    def add(self, chosen: NDArray[np.int64]) -> None:
        """Choose these candidates."""
        for candidate in chosen.tolist():
            tokens, occurrences = self._counts.entries(candidate)
            self._totals[tokens] += occurrences


def _times_log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values * np.log(values)
