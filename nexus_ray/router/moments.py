"""Exact, mergeable moments of router probabilities: the statistics from which experts are selected.

Instead of the probabilities of every token, O(tokens * layers * experts), only their count, mean and co-moment
matrix are kept, O(layers * experts^2), and merged without error (Chan, Golub & LeVeque 1983, "Algorithms for
computing the sample variance", The American Statistician 37(3); Stanford report STAN-CS-79-773, 1979).

Everything is kept twice, for two halves of the text that share no document, or at most one (`router/halves.py`), so
that the stability of any conclusion can be checked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays

from nexus_ray.errors import ArtefactError, DataError
from nexus_ray.router.files import REMAKE, Arrays, read_arrays, to_bytes, write_arrays
from nexus_ray.storage import Place

HALVES = 2
_Number = TypeVar("_Number", np.float64, np.int64)


@dataclass(frozen=True, eq=False)
class RouterMoments:
    """Moments of the full softmax router probabilities of each layer, in P independent parts of the text.

    P is 2, the halves, or 1 after `both_halves`. Symmetric matrices are kept as their upper triangle, row by row, of
    pairs = experts (experts + 1) / 2 values (`pack_symmetric`).

    Attributes:
        count: [P] int64 tokens.
        mean: [P, layers, experts] float64 mean probability.
        m2: [P, layers, pairs] float64 co-moment: the sum over tokens of (p - mean)(p - mean)^T.
        selected_together: [P, layers, pairs] int64 tokens for which both experts were among the top k; an expert
            with itself: the tokens that selected it.
        gate_mass: [P, layers, experts] float64 sum of the expert's gate weights, renormalised over the top k.
        reap: [P, layers, experts] float64 sum, over the tokens for which the expert was selected, of gate weight x
            norm of the expert's output; NaN where outputs were not recorded.
    """

    count: NDArray[np.int64]
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    selected_together: NDArray[np.int64]
    gate_mass: NDArray[np.float64]
    reap: NDArray[np.float64]

    @classmethod
    def empty(cls, layers: int, experts: int) -> Self:
        """Moments of no tokens: the neutral element of `merge`."""
        shape = (HALVES, layers, experts)
        return cls(
            count=np.zeros(HALVES, np.int64),
            mean=np.zeros(shape),
            m2=np.zeros((HALVES, layers, experts * (experts + 1) // 2)),
            selected_together=np.zeros((HALVES, layers, experts * (experts + 1) // 2), np.int64),
            gate_mass=np.zeros(shape),
            reap=np.zeros(shape),
        )

    @property
    def layers(self) -> int:
        """Number of MoE layers."""
        return int(self.mean.shape[1])

    @property
    def experts(self) -> int:
        """Routed experts of a layer."""
        return int(self.mean.shape[2])

    @property
    def tokens(self) -> int:
        """Tokens of all parts together."""
        return int(self.count.sum())

    @property
    def selected(self) -> NDArray[np.int64]:
        """[P, layers, experts] tokens for which the expert was among the top k."""
        first, second = np.triu_indices(self.experts)
        return self.selected_together[..., first == second]

    def merge(self, other: Self) -> Self:
        """Moments of both texts together, part by part; exact up to float64 rounding.

        With n = n_a + n_b and d = mean_b - mean_a: mean = mean_a + d n_b / n and
        m2 = m2_a + m2_b + d d^T n_a n_b / n (Chan, Golub & LeVeque 1983, equations 2.1).
        """
        count = self.count + other.count
        divisor = np.maximum(count, 1).astype(np.float64)
        delta = other.mean - self.mean
        shift = delta * (other.count / divisor)[:, None, None]
        weight = (self.count / divisor * other.count)[:, None, None]
        first, second = np.triu_indices(self.experts)
        return type(self)(
            count=count,
            mean=self.mean + shift,
            m2=self.m2 + other.m2 + weight * delta[..., first] * delta[..., second],
            selected_together=self.selected_together + other.selected_together,
            gate_mass=self.gate_mass + other.gate_mass,
            reap=self.reap + other.reap,
        )

    def part(self, index: int) -> Self:
        """Part `index` alone, with P = 1."""
        chosen = slice(index, index + 1)
        return type(self)(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def layer(self, index: int) -> Self:
        """Layer `index` alone; the layer dimension stays, with size 1."""
        chosen = {name: values[:, index : index + 1] for name, values in vars(self).items() if name != "count"}
        return type(self)(count=self.count, **chosen)

    def both_halves(self) -> Self:
        """All tokens as one part, with P = 1."""
        return self.part(0).merge(self.part(1))

    def covariance(self) -> NDArray[np.float64]:
        """[P, layers, experts, experts] sample covariance (divisor n - 1) of the probabilities.

        Raises:
            DataError: a part holds fewer than two tokens.
        """
        if (self.count < 2).any():
            raise DataError(
                f"router statistics of {self.count.tolist()} tokens have no covariance",
                "add text or raise collect.tokens",
            )
        return unpack_symmetric(self.m2, self.experts) / (self.count - 1)[:, None, None, None]

    def co_selection(self) -> NDArray[np.int64]:
        """[P, layers, experts, experts] tokens for which both experts were selected."""
        return unpack_symmetric(self.selected_together, self.experts)

    def usage(self) -> NDArray[np.float64]:
        """[P, layers, experts] share of the selections that went to each expert; a layer sums to 1."""
        selected = self.selected
        return selected / np.maximum(selected.sum(axis=-1, keepdims=True), 1)

    @property
    def has_reap(self) -> bool:
        """Whether the outputs of the experts were recorded for all tokens."""
        return bool(np.isfinite(self.reap).all())

    def saliency(self) -> NDArray[np.float64]:
        """[P, layers, experts] mean of gate x output norm over the tokens an expert got; 0 for one that got none.

        REAP, router-weighted expert activation pruning (Lasby et al., arXiv 2510.13999).

        Raises:
            ArtefactError: outputs were not recorded.
        """
        if not self.has_reap:
            raise ArtefactError(
                "the router statistics hold no expert output norms",
                "set model.experts=packed, collect.expert_norms=true, and run `nexus-ray run CONFIG --from collect`",
            )
        return self.reap / np.maximum(self.selected, 1)

    def arrays(self, prefix: str = "") -> Arrays:
        """The fields as named arrays for a safetensors file, each name with `prefix` before it."""
        return {prefix + field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Arrays, prefix: str = "") -> Self:
        """The inverse of `arrays`; a missing field raises KeyError."""
        return cls(**{field.name: arrays[prefix + field.name] for field in fields(cls)})

    def to_bytes(self) -> bytes:
        """The fields in the safetensors format, for a message between processes."""
        return to_bytes(self.arrays())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The inverse of `to_bytes`."""
        return cls.from_arrays(load_arrays(data))

    def save(self, path: Place) -> None:
        """Write one safetensors file atomically."""
        write_arrays(path, self.arrays())

    @classmethod
    def load(cls, path: Place) -> Self:
        """Read what `save` wrote.

        Raises:
            ArtefactError: the file is missing, damaged or of another kind.
        """
        arrays = read_arrays(path)
        try:
            return cls.from_arrays(arrays)
        except KeyError as error:
            raise ArtefactError(f"{path} holds no router moments: {error} is missing", REMAKE) from error


class OrderedMerge:
    """Merges moments in a fixed order, whichever arrive first; holds only those that wait for an earlier one.

    Args:
        order: the numbers that `add` will be given, in the order of the merge.
        empty: moments of no tokens.
    """

    def __init__(self, order: Iterable[int], empty: RouterMoments) -> None:
        self.merged = empty
        self._left = deque(order)
        self._waiting: dict[int, RouterMoments] = {}

    def add(self, number: int, moments: RouterMoments) -> None:
        """Take in the moments with this number."""
        self._waiting[number] = moments
        while self._left and self._left[0] in self._waiting:
            self.merged = self.merged.merge(self._waiting.pop(self._left.popleft()))


def pack_symmetric(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., n, n] symmetric matrices -> [..., n (n + 1) / 2], their upper triangles row by row."""
    first, second = np.triu_indices(matrices.shape[-1])
    return matrices[..., first, second]


def unpack_symmetric(packed: NDArray[_Number], size: int) -> NDArray[_Number]:
    """The inverse of `pack_symmetric` for `size` x `size` matrices."""
    first, second = np.triu_indices(size)
    matrices = np.empty((*packed.shape[:-1], size, size), packed.dtype)
    matrices[..., first, second] = packed
    matrices[..., second, first] = packed
    return matrices
