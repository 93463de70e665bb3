"""DistillKit's compressed teacher outputs, as its documentation describes them, to measure against.

The K largest log-probabilities are sorted, largest first. The first `exact_k` are kept in bfloat16. The others are a
curve over their rank t = 0, 1, ...: the least-squares fit of the terms t^0, t^1, ... and sqrt(t), of which the
coefficients are kept in float32. Token ids take ceil(log2 V) bits each. Nothing says how much probability the other
tokens have: with `symmetric_uniform` a reader gives them what is missing to one in equal parts, 1e-8 each at least.

What is read then need not add up to one. Both readings are measured, as it is and renormalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_PROBABILITY = 1e-8
_BFLOAT16, _FLOAT32 = 2, 4


@dataclass(frozen=True)
class DistillKit:
    """One setting of the format.

    Attributes:
        k: tokens kept.
        exact_k: of them, kept in bfloat16.
        terms: exponents of the rank; 0.5 is its square root.
    """

    k: int
    exact_k: int
    terms: tuple[float, ...]

    def bytes_per_token(self, vocabulary: int) -> int:
        """Bytes of one position."""
        ids = (self.k * (vocabulary - 1).bit_length() + 7) // 8
        return ids + self.exact_k * _BFLOAT16 + len(self.terms) * _FLOAT32

    def reconstructed(self, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a reader has of dense [positions, V] float64 log-probabilities.

        Returns:
            ids [positions, k], their log-probabilities [positions, k], and that of each other token [positions].
        """
        top = log_probs.topk(self.k, dim=-1)
        exact, rest = top.values.split([self.exact_k, self.k - self.exact_k], dim=-1)
        kept = torch.cat([exact.bfloat16().double(), self._fitted(rest)], dim=-1)
        missing = 1 - kept.exp().sum(-1)
        each = (missing / (log_probs.shape[-1] - self.k)).clamp(min=_LEAST_PROBABILITY)
        return top.indices, kept, each.log()

    def _fitted(self, values: Tensor) -> Tensor:
        """[positions, k - exact_k] values as their curve gives them; evaluated in float64, better than stored."""
        ranks = torch.arange(values.shape[-1], dtype=torch.float64)
        basis = torch.stack([ranks**term for term in self.terms], dim=-1)
        coefficients = torch.linalg.lstsq(basis, values.T).solution.float().double()
        return (basis @ coefficients).T


BUDGET = DistillKit(k=50, exact_k=1, terms=(0, 1, 0.5))
RECOMMENDED = DistillKit(k=128, exact_k=16, terms=(0, 1, 2, 3, 4, 0.5))
