"""Token counts of candidate sequences, and the one rule for a budget of tokens that every way of choosing follows.

Sequences are chosen until none that is left fits into the budget. Sequences without tokens are never chosen. When not
even the shortest fits, the shortest is chosen, so that a choice from candidates with text is never empty.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenCounts:
    """How often each token occurs in each candidate; candidate i owns entries offsets[i] to offsets[i + 1].

    Attributes:
        offsets: [candidates + 1] int64.
        tokens: [entries] int32, ascending and distinct within a candidate.
        counts: [entries] int32, at least 1.
        lengths: [candidates] int64, tokens of a candidate: the sum of its counts.
    """

    offsets: NDArray[np.int64]
    tokens: NDArray[np.int32]
    counts: NDArray[np.int32]
    lengths: NDArray[np.int64]

    @classmethod
    def from_sequences(cls, sequences: Iterable[NDArray[np.integer]]) -> TokenCounts:
        """Count the tokens of each sequence of ids, without padding."""
        pairs = [np.unique(sequence, return_counts=True) for sequence in sequences]
        empty = np.zeros(0, dtype=np.int32)
        return cls(
            offsets=np.cumsum([0, *(len(tokens) for tokens, _ in pairs)], dtype=np.int64),
            tokens=np.concatenate([empty, *(tokens.astype(np.int32) for tokens, _ in pairs)]),
            counts=np.concatenate([empty, *(counts.astype(np.int32) for _, counts in pairs)]),
            lengths=np.asarray([counts.sum() for _, counts in pairs], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def vocabulary(self) -> int:
        """One more than the largest token id."""
        return int(self.tokens.max(initial=-1)) + 1

    @cached_property
    def owners(self) -> NDArray[np.int64]:
        """[entries] the candidate of each entry."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def entries(self, candidate: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Distinct tokens of a candidate and their counts."""
        span = slice(self.offsets[candidate], self.offsets[candidate + 1])
        return self.tokens[span], self.counts[span]

    def totals(self, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        """[vocabulary] occurrences of each token in the chosen candidates, whole numbers."""
        times = np.bincount(chosen, minlength=len(self))
        return _sum_by(self.tokens, self.counts * times[self.owners], self.vocabulary)

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[candidates] sum of the values [entries] of each candidate."""
        return _sum_by(self.owners, values, len(self))

    def affordable(self, budget: int) -> int:
        """Tokens to choose: the budget, at least the shortest candidate that holds a token, at most all there are."""
        total = int(self.lengths.sum())
        shortest = int(self.lengths.min(initial=total, where=self.lengths > 0))
        return min(max(budget, shortest), total)


def choose_randomly(counts: TokenCounts, budget: int, seed: int) -> NDArray[np.int64]:
    """Take candidates in the order of a seeded permutation, passing over those that do not fit any more.

    Args:
        counts: the candidates.
        budget: tokens to choose at most; more only when the shortest candidate is longer.
        seed: of the permutation.

    Returns:
        Numbers of the chosen candidates, in order of choice.
    """
    order = np.argsort(permutation(counts, seed))
    return take_while_fitting(counts.lengths, order, counts.affordable(budget))


def permutation(counts: TokenCounts, seed: int) -> NDArray[np.int64]:
    """[candidates] place of each candidate in a random order."""
    return np.random.default_rng(seed).permutation(len(counts))


def take_while_fitting(lengths: NDArray[np.int64], order: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Candidates in the given order, those without tokens and those that do not fit what is left passed over."""
    taken: list[int] = []
    for candidate in order.tolist():
        length = int(lengths[candidate])
        if 0 < length <= budget:
            taken.append(candidate)
            budget -= length
    return np.asarray(taken, dtype=np.int64)


def _sum_by(index: NDArray[np.integer], values: NDArray[Any], size: int) -> NDArray[np.float64]:
    """[size] sums of the values that share an index."""
    return np.asarray(np.bincount(index, weights=values, minlength=size), dtype=np.float64)
