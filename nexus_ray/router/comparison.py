"""How much two models' routers differ on the same text, from their moments, and how much is noise.

Token by token drift (KL, L1, selected experts) needs both models on every token: `evaluation/drift.py`. Moments say how
the whole changed: which experts are used and how their probabilities vary. They can be collected at different times, in
different jobs, and be held against what two halves of the text differ by for one and the same model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from nexus_ray.errors import ArtefactError
from nexus_ray.router.moments import HALVES, RouterMoments


class LayerComparison(BaseModel):
    """Two models' routers in one layer.

    Total variation is half the sum of absolute differences of two distributions over the experts: 0 equal, 1 disjoint.

    Attributes:
        usage_distance: total variation between the shares of selections that go to each expert.
        probability_distance: total variation between the mean router probabilities.
        covariance_distance: Frobenius norm of the difference of the covariances of the probabilities, as a share of the
            first one's norm.
        halves_distance: for scale, the total variation of usage between the two halves of the text for the first
            model alone; None when a half is empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    usage_distance: float
    probability_distance: float
    covariance_distance: float
    halves_distance: float | None


def compare_routers(first: RouterMoments, second: RouterMoments) -> list[LayerComparison]:
    """Compare moments of two models on the same text, layer by layer.

    Raises:
        ArtefactError: they are of different shapes or numbers of tokens, so certainly not of the same text. Moments
            cannot tell more; that the text is the same is for the caller to know.
    """
    if first.mean.shape != second.mean.shape or (first.count != second.count).any():
        raise ArtefactError(
            f"router moments of {first.count.tolist()} and {second.count.tolist()} tokens in {first.layers} and "
            f"{second.layers} layers cannot be compared",
            "collect both on the same calibration text",
        )
    usage, other_usage = (moments.both_halves().usage()[0] for moments in (first, second))
    mean, other_mean = (moments.both_halves().mean[0] for moments in (first, second))
    covariance, other_covariance = (moments.both_halves().covariance()[0] for moments in (first, second))
    change = np.linalg.norm(other_covariance - covariance, axis=(1, 2))
    size = np.linalg.norm(covariance, axis=(1, 2))
    halves = _halves_distance(first)
    return [
        LayerComparison(
            usage_distance=float(total_variation(usage, other_usage)[layer]),
            probability_distance=float(total_variation(mean, other_mean)[layer]),
            covariance_distance=float(change[layer] / size[layer]) if size[layer] > 0 else float(change[layer] > 0),
            halves_distance=None if halves is None else float(halves[layer]),
        )
        for layer in range(first.layers)
    ]


def total_variation(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half the sum over the last dimension of |first - second|."""
    distance: NDArray[np.float64] = np.abs(first - second).sum(axis=-1) / 2
    return distance


def as_rows(comparison: list[LayerComparison]) -> dict[str, list[Any]]:
    """The comparison by figure, each a list over the layers."""
    return {name: [getattr(layer, name) for layer in comparison] for name in LayerComparison.model_fields}


def _halves_distance(moments: RouterMoments) -> NDArray[np.float64] | None:
    """[layers] total variation of usage between the two halves."""
    if moments.count.shape[0] < HALVES or (moments.count == 0).any():
        return None
    usage = moments.usage()
    return total_variation(usage[0], usage[1])
