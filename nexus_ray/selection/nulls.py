"""What scores would be without any structure: draws from null models.

Structureless data concentrate a score too, because the best experts are picked after the fact. A share of the score
says something only beside the share that the best experts of a structureless layer have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nexus_ray.selection.scores import Floats, cumulative_shares

DRAWS = 100
_HIGH = 0.95


@dataclass(frozen=True)
class NullShares:
    """Cumulative shares [draws, experts] of the best experts by rank, one row a draw of the null model."""

    curves: Floats

    @classmethod
    def of_scores(cls, scores: Floats) -> NullShares:
        """From drawn scores [draws, experts]."""
        return cls(cumulative_shares(scores))

    @property
    def mean_curve(self) -> Floats:
        """[experts] mean share of the best 1, 2, ... experts."""
        mean: Floats = self.curves.mean(axis=0)
        return mean

    def mean(self, top_k: int) -> float:
        """Mean share of the best `top_k`."""
        return float(self.curves[:, top_k - 1].mean())

    def high(self, top_k: int) -> float:
        """The share of the best `top_k` that 5 % of the draws exceed."""
        return float(np.quantile(self.curves[:, top_k - 1], _HIGH))


def independent_experts(variances: Floats, tokens: int, draws: int, generator: np.random.Generator) -> Floats:
    """[draws, experts, experts] sample covariances of experts that are independent and keep their variances.

    This is what shuffling each expert's probabilities among the tokens would give, without needing them: for
    independent normal columns the sample covariance of n tokens is Wishart(diag(variances), n - 1) / (n - 1), drawn
    by its Cholesky factor (Bartlett 1933; Anderson 2003, "Multivariate Statistical Analysis", 7.2). The plain
    diagonal, the limit of infinite text, is no substitute: its components are single experts, so that fewer
    components than selected experts would always give a share of 1.

    Args:
        variances: [experts] of the probabilities.
        tokens: more than experts.
        draws: how many covariances.
        generator: of the draws.
    """
    size = len(variances)
    freedom = tokens - 1
    factor = np.tril(generator.standard_normal((draws, size, size)), -1)
    factor[:, np.arange(size), np.arange(size)] = np.sqrt(generator.chisquare(freedom - np.arange(size), (draws, size)))
    factor *= np.sqrt(np.clip(variances, 0.0, None))[:, None]
    covariance: Floats = factor @ factor.swapaxes(-1, -2) / freedom
    return covariance


def equal_experts(
    first: Floats, second: Floats, tokens: tuple[int, int], draws: int, generator: np.random.Generator
) -> Floats:
    """[draws, experts] scores of experts that are equal but for the noise of estimating them.

    The noise is what the two halves of the text differ by. For halves of n_1 and n_2 tokens with scores a and b of
    one expectation, E (a - b)^2 = v (1 / n_1 + 1 / n_2) with v the variance of a token, and the pooled score has
    variance s^2 = v / (n_1 + n_2) = (a - b)^2 n_1 n_2 / (n_1 + n_2)^2: a quarter of the squared difference for
    halves of one size. s^2 is averaged over the experts; scores are the mean + s * normal, clipped at zero. An s from
    E differences is uncertain itself, so each draw has its own, s * sqrt(f / chi^2_f) with f = E - 1, as in Student's
    t: without it three times as many structureless layers as announced exceed the 95 % quantile (32 experts).

    Args:
        first: [experts] scores by one half of the text.
        second: by the other.
        tokens: of the halves; with none in one of them the noise is unknown and taken as zero.
        draws: how many score vectors.
        generator: of the draws.
    """
    weights = np.asarray(tokens) / max(sum(tokens), 1)
    mean = float((weights[0] * first + weights[1] * second).mean())
    noise = float(np.sqrt(np.mean((first - second) ** 2) * weights[0] * weights[1]))
    freedom = max(len(first) - 1, 1)
    noises = noise * np.sqrt(freedom / generator.chisquare(freedom, (draws, 1)))
    return np.clip(mean + noises * generator.standard_normal((draws, len(first))), 0.0, None)
