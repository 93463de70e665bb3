"""Ridge regression from sums alone: the data are seen once, in pieces, and never kept.

For features A [n, f] and targets Y [n, t] the weights minimise ||Y - A W^T - 1 b^T||^2 + a ||W||^2; the intercept b is
not penalised. They follow from sums over the rows (normal equations; Hoerl & Kennard 1970, "Ridge Regression: Biased
Estimation for Nonorthogonal Problems", Technometrics 12(1)), here in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RidgeFit:
    """A linear map and how well it fits.

    Attributes:
        weight: [targets, features] float64.
        bias: [targets] float64.
        explained: share of the targets' variance over the rows that the map reproduces; at most 1, and 0 for
            targets that do not vary.
    """

    weight: Tensor
    bias: Tensor
    explained: float


class RidgeSums:
    """Sums over rows from which a ridge regression follows.

    Args:
        features: columns of the features.
        targets: columns of the targets.
        device: where the sums are kept.
    """

    def __init__(self, features: int, targets: int, device: torch.device | str = "cpu") -> None:
        self.rows = 0
        self._features = torch.zeros(features, dtype=torch.float64, device=device)
        self._targets = torch.zeros(targets, dtype=torch.float64, device=device)
        self._gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        self._cross = torch.zeros(features, targets, dtype=torch.float64, device=device)
        self._target_square = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add rows: [n, features] and [n, targets] of any floating type, on the sums' device."""
        a, y = features.double(), targets.double()
        self.rows += len(a)
        self._features += a.sum(dim=0)
        self._targets += y.sum(dim=0)
        self._gram.addmm_(a.T, a)
        self._cross.addmm_(a.T, y)
        self._target_square += y.square().sum()

    def solve(self, ridge: float) -> RidgeFit:
        """Fit with penalty a = `ridge` * the mean diagonal of the centred A^T A.

        Raises:
            ValueError: no row was added.
        """
        if not self.rows:
            raise ValueError("a regression needs at least one row")
        feature_mean, target_mean = self._features / self.rows, self._targets / self.rows
        gram = torch.addr(self._gram, self._features, feature_mean, alpha=-1)
        cross = torch.addr(self._cross, self._features, target_mean, alpha=-1)
        weight = _solve_ridge(gram, cross, ridge)
        bias = target_mean - feature_mean @ weight
        variance = self._target_square - self._targets @ target_mean
        residual = variance - 2 * (weight * cross).sum() + (weight * (gram @ weight)).sum()
        explained = 1 - float(residual / variance) if variance > 0 else 0.0
        return RidgeFit(weight.T, bias, explained)


def _solve_ridge(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """[features, targets]; features that never vary get no weight."""
    penalty = ridge * gram.diagonal().mean()
    if penalty <= 0:
        return torch.zeros_like(cross)
    penalised = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(penalised))
