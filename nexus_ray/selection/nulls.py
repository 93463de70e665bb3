"""What scores would be without any structure: draws from null models.

Structureless data concentrate a score too, because the best experts are picked after the fact. A share of the score
says something only beside the share that the best experts of a structureless layer have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls  # type: ignore[import-untyped]

from nexus_ray.router.moments import RouterMoments
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


def independent_experts(halves: RouterMoments, draws: int, generator: np.random.Generator) -> Floats:
    """[draws, experts, experts] sample covariances of experts that are independent but for summing to one.

    Expert e has a part u_e of its own, independent of all others', and gives to the parts of all experts what its
    mean probability w_e says: p_e = w_e + u_e - w_e sum(u). Of independent tokens this leaves the covariance
    P diag(d) P^T with P = I - w 1^T, where d are the variances of u. So it is for a softmax of independent logits
    that vary little, and for one that picks a single expert a token; experts that do not sum to one would have a
    component more than a softmax can. Without any of it the first component of 16 equal experts is above its null in
    9 of 10 structureless layers.

    Args:
        halves: moments of one layer in two halves of the text.
        draws: how many covariances.
        generator: of the draws.
    """
    pooled = halves.both_halves()
    weights = pooled.mean[0, 0]
    variances = np.diag(pooled.covariance()[0, 0])
    own = own_variances(variances, weights)
    projection = _projection(own, weights, variances)
    covariance: Floats = projection @ wishart(own, effective_freedom(halves), draws, generator) @ projection.T
    return covariance


def _projection(own: Floats, weights: Floats, variances: Floats) -> Floats:
    """[experts, experts] P, its rows scaled to the measured variances where no parts of their own give these."""
    projection = np.eye(len(own)) - weights[:, None]
    given = np.square(projection) @ own
    scale = np.sqrt(np.divide(variances, given, out=np.zeros_like(given), where=given > 0))
    return projection * scale[:, None]


def own_variances(variances: Floats, weights: Floats) -> Floats:
    """[experts] d, at least 0, for which P diag(d) P^T has a diagonal as near to `variances` as it can be.

    That diagonal is linear in d: v_e = sum over f of ([e = f] - w_e)^2 d_f. For equal weights 1 / E and E > 2 it gives
    d_e = (v_e - m / E) / (1 - 2 / E) with m = mean(v) / (1 - 1 / E). The least squares are not negative (Lawson &
    Hanson 1974, "Solving Least Squares Problems"), because an expert that varies less than what it gives to the
    others has no such d.

    Args:
        variances: [experts] of the probabilities.
        weights: [experts] mean probabilities, which sum to one.
    """
    scale = float(variances.max(initial=0.0))
    if scale <= 0:
        return np.zeros_like(variances)
    own: Floats = nnls(np.square(np.eye(len(weights)) - weights[:, None]), variances / scale)[0]
    return own * scale


def effective_freedom(halves: RouterMoments) -> float:
    """How many independent, normal tokens would leave as much noise in the covariance as the halves show.

    The sample covariance of experts e and f varies by (v_e v_f + c_ef^2) / n for n such tokens (Anderson 2003,
    "Multivariate Statistical Analysis", 7.3). Tokens of one sequence resemble each other, which is more noise, and
    a softmax of unequal tokens has less. With A and B the covariances by halves of n_1 and n_2 tokens, (A - B)_ef^2 is
    1 / n_1 + 1 / n_2 times as large on average as n times the variance for all n; both are summed over pairs.

    Returns:
        At least one for each expert, below which a Wishart matrix has no density; tokens - 1 where a half holds
        fewer than two tokens or both are equal.
    """
    pooled = halves.both_halves().covariance()[0, 0]
    nominal = float(halves.tokens - 1)
    if (halves.count < 2).any():
        return max(nominal, float(len(pooled)))
    first, second = halves.covariance()[:, 0]
    pairs = ~np.eye(len(pooled), dtype=bool)
    expected = (np.outer(np.diag(pooled), np.diag(pooled)) + np.square(pooled))[pairs].sum()
    found = np.square(first - second)[pairs].sum() / (1 / halves.count).sum()
    return max(float(halves.tokens * expected / found) if found > 0 else nominal, float(len(pooled)))


def wishart(variances: Floats, freedom: float, draws: int, generator: np.random.Generator) -> Floats:
    """[draws, size, size] Wishart(diag(variances), freedom) / freedom: covariances of independent normal columns.

    This is what shuffling each column would give, without needing the rows. It is drawn by its Cholesky factor
    (Bartlett 1933; Anderson 2003, 7.2). The plain diagonal, the limit of infinite text, is no substitute: its
    components are single columns, so that fewer components than selected experts would always give a share of 1.

    Args:
        variances: [size] of the columns.
        freedom: at least `size`.
        draws: how many covariances.
        generator: of the draws.
    """
    size = len(variances)
    factor = np.tril(generator.standard_normal((draws, size, size)), -1)
    factor[:, np.arange(size), np.arange(size)] = np.sqrt(generator.chisquare(freedom - np.arange(size), (draws, size)))
    factor *= np.sqrt(np.clip(variances, 0.0, None))[:, None]
    covariance: Floats = factor @ factor.swapaxes(-1, -2) / freedom
    return covariance


def equal_experts(
    scores: Floats, observations: NDArray[np.int64], draws: int, generator: np.random.Generator
) -> Floats:
    """[draws, experts] scores of experts that are equal but for the noise of estimating them.

    Scores are means over observations, of which an expert that is seldom chosen may have few. The noise is what the
    two halves of the text differ by: for scores a and b of one expectation from n_1 and n_2 observations,
    E (a - b)^2 = v (1 / n_1 + 1 / n_2) with v the variance of an observation, and the pooled score has the variance
    v / (n_1 + n_2). v is averaged over the experts that both halves observed; scores are the pooled mean + normal
    noise, clipped at zero, and zero for experts without observations. A v from so few differences is uncertain itself,
    so each draw has its own, v f / chi^2_f with f one less than their number, as in Student's t: without it three
    times as many structureless layers as announced exceed the 95 % quantile (32 experts).

    Args:
        scores: [2, experts] by either half of the text.
        observations: [2, experts] over which they are means; where no expert has any in both halves the noise is
            unknown and taken as zero.
        draws: how many score vectors.
        generator: of the draws.
    """
    total = observations.sum(axis=0)
    known = (observations > 0).all(axis=0)
    mean = float((observations * scores).sum() / max(total.sum(), 1))
    variances = np.square(scores[0] - scores[1])[known] / (1 / observations[:, known]).sum(axis=0)
    freedom = max(int(known.sum()) - 1, 1)
    drawn = variances.mean() * freedom / generator.chisquare(freedom, (draws, 1)) if known.any() else 0.0
    noise = np.sqrt(drawn / np.maximum(total, 1)) * generator.standard_normal((draws, len(total)))
    return np.where(total > 0, np.clip(mean + noise, 0.0, None), 0.0)
