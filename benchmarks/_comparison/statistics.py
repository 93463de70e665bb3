"""How sure one can be of a mean over runs and held-out sequences, and of a difference between two methods."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean and its confidence interval.

    Attributes:
        value: the mean.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is sure at the interval's confidence."""
        return self.low > 0 or self.high < 0


def crossed_mean(values: NDArray[np.float64], confidence: float = 0.95) -> Estimate:
    """Mean of [runs, sequences], for other runs and other text.

    Runs and sequences are crossed random effects: with a runs and b sequences the variance of the mean is at most
    s_r^2 / a + s_c^2 / b, the variances of the means of rows and of columns. Degrees of freedom by Satterthwaite
    (1946, "An Approximate Distribution of Estimates of Variance Components", Biometrics 2(6)). One run alone gives an
    interval for other text only.

    Args:
        values: paired differences, or losses; at least two sequences.
        confidence: coverage of the interval.
    """
    runs, sequences = values.shape
    parts = [(float(values.mean(axis=0).var(ddof=1)) / sequences, sequences - 1)]
    if runs > 1:
        parts.append((float(values.mean(axis=1).var(ddof=1)) / runs, runs - 1))
    variance = sum(part for part, _ in parts)
    mean = float(values.mean())
    if variance == 0:
        return Estimate(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / own for part, own in parts)
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * variance**0.5
    return Estimate(mean, mean - half, mean + half)
