"""The routers of base and student on the same batches: drift token by token, and the moments of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_ray.errors import ArtefactError, DataError
from nexus_ray.evaluation.drift import DriftSums, router_drift
from nexus_ray.families import MoeDimensions
from nexus_ray.router.accumulate import moments_of_logits
from nexus_ray.router.comparison import LayerComparison, compare_routers
from nexus_ray.router.moments import OrderedMerge, RouterMoments

DIVERGED = "train again with a lower train.optimiser.learning_rate"


@dataclass(frozen=True)
class PairedRouters:
    """What two models' routers did on the same tokens; `a + b` merges two sets of tokens.

    Attributes:
        drift: sums of distances, token by token.
        base: moments of the base's routers.
        student: moments of the student's.
    """

    drift: DriftSums
    base: RouterMoments
    student: RouterMoments

    @classmethod
    def zero(cls, dimensions: MoeDimensions) -> PairedRouters:
        """Those of no token."""
        empty = RouterMoments.empty(dimensions.layers, dimensions.experts)
        return cls(DriftSums.zero(dimensions.layers), empty, empty)

    @classmethod
    def of(
        cls,
        base: Tensor,
        student: Tensor,
        valid: NDArray[np.bool_],
        half: NDArray[np.integer],
        top_k: int,
        names: Sequence[str] = (),
    ) -> PairedRouters:
        """Those of one batch.

        Args:
            base: [sequences, length, layers, experts] router logits of the base.
            student: the same of the student.
            valid: [sequences, length] true on the tokens that count.
            half: [sequences] 0 or 1, the half of the text that each sequence belongs to.
            top_k: experts that the router selects.
            names: of the sequences, for messages; default: their numbers.

        Raises:
            DataError: the base's routers give NaN or infinity.
            ArtefactError: the student's do, where the base's do not.
        """
        base_moments = moments_of_logits(base, valid, half, top_k, names=names)
        try:
            student_moments = moments_of_logits(student, valid, half, top_k, names=names)
        except DataError as error:
            raise ArtefactError(f"the trained overlay diverged: the student's {error.message}", DIVERGED) from error
        return cls(router_drift(base, student, torch.from_numpy(valid), top_k), base_moments, student_moments)

    def __add__(self, other: PairedRouters) -> PairedRouters:
        return PairedRouters(self.drift + other.drift, self.base.merge(other.base), self.student.merge(other.student))


class MomentsPair:
    """Merges the moments of base and student over shards, in their order, whichever arrive first.

    Args:
        order: numbers of the shards.
    """

    def __init__(self, order: Sequence[int]) -> None:
        self._order = order
        self._merges: list[OrderedMerge] = []

    def add(self, shard: int, base: bytes, student: bytes) -> None:
        """Take in a shard's moments, as `RouterMoments.to_bytes` gives them."""
        pair = [RouterMoments.from_bytes(data) for data in (base, student)]
        if not self._merges:
            empty = RouterMoments.empty(pair[0].layers, pair[0].experts)
            self._merges = [OrderedMerge(self._order, empty) for _ in pair]
        for merge, moments in zip(self._merges, pair, strict=True):
            merge.add(shard, moments)

    def compare(self) -> list[LayerComparison]:
        """Both models, layer by layer."""
        base, student = (merge.merged for merge in self._merges)
        return compare_routers(base, student)

    def selected(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[layers, experts] how often base and student selected each expert."""
        base, student = (merge.merged.both_halves().selected[0] for merge in self._merges)
        return base, student
