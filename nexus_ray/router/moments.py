"""Exact, mergeable moments of router probabilities: the statistics from which experts are selected.

Instead of the probabilities of every token, O(tokens * layers * experts), only their count, mean and co-moment
matrix are kept, O(layers * experts^2), and merged without error (Chan, Golub & LeVeque 1983, "Algorithms for
computing the sample variance", The American Statistician 37(3); Stanford report STAN-CS-79-773, 1979).

Everything is kept twice, for the packed sequences of even and of odd number, so that the stability of any
conclusion can be checked on two halves of the text. Neighbouring sequences may share a document, so the halves are
disjoint in tokens but not in documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from nexus_ray.errors import ArtefactError, DataError
from nexus_ray.modeling.packed_experts import ExpertNorms
from nexus_ray.storage import atomic_file

HALVES = 2


@dataclass(frozen=True, eq=False)
class RouterMoments:
    """Moments of the full softmax router probabilities of each layer, in P independent parts of the text.

    P is 2, the halves, or 1 after `both_halves`.

    Attributes:
        count: [P] int64 tokens.
        mean: [P, layers, experts] float64 mean probability.
        m2: [P, layers, experts, experts] float64 co-moment: the sum over tokens of (p - mean)(p - mean)^T.
        selected: [P, layers, experts] int64 tokens for which the expert was among the top k.
        gate_mass: [P, layers, experts] float64 sum of the expert's gate weights, renormalised over the top k.
        reap: [P, layers, experts] float64 sum, over the tokens for which the expert was selected, of gate weight x
            norm of the expert's output; NaN where outputs were not recorded.
    """

    count: NDArray[np.int64]
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    selected: NDArray[np.int64]
    gate_mass: NDArray[np.float64]
    reap: NDArray[np.float64]

    @classmethod
    def empty(cls, layers: int, experts: int) -> Self:
        """Moments of no tokens: the neutral element of `merge`."""
        shape = (HALVES, layers, experts)
        return cls(
            count=np.zeros(HALVES, np.int64),
            mean=np.zeros(shape),
            m2=np.zeros((*shape, experts)),
            selected=np.zeros(shape, np.int64),
            gate_mass=np.zeros(shape),
            reap=np.zeros(shape),
        )

    @classmethod
    def from_logits(
        cls,
        router_logits: Tensor,
        valid: NDArray[np.bool_],
        half: NDArray[np.int64],
        experts_per_token: int,
        expert_norms: Sequence[ExpertNorms] = (),
    ) -> Self:
        """Moments of one batch, computed in float64 on the logits' device.

        Args:
            router_logits: [sequences, length, layers, experts] logits over all experts.
            valid: [sequences, length] false on padding, which is not counted and may hold anything.
            half: [sequences] 0 or 1, the half each sequence belongs to.
            experts_per_token: how many experts the router selects.
            expert_norms: what each layer's experts gave to the sequences * length tokens, padding included; empty
                where it was not recorded.

        Raises:
            DataError: a logit or output of a valid token is NaN or infinite; names layer and sequence.
        """
        mask = torch.as_tensor(valid, device=router_logits.device)
        _check_finite(router_logits, mask)
        side = torch.as_tensor(half, device=router_logits.device)
        chosen = [mask & (side == part)[:, None] for part in range(HALVES)]
        rows = [router_logits[part] for part in chosen]
        layers = range(router_logits.shape[2])
        parts = [[_layer_moments(tokens[:, layer], experts_per_token) for layer in layers] for tokens in rows]
        mean, m2, selected, gate_mass = (
            np.stack([np.stack([moments[index] for moments in part]) for part in parts]) for index in range(4)
        )
        count = np.asarray([len(tokens) for tokens in rows], np.int64)
        reap = np.full_like(gate_mass, np.nan)
        if expert_norms:
            experts = router_logits.shape[3]
            reap = np.stack([[_summed_norms(norms, part, experts) for norms in expert_norms] for part in chosen])
        return cls(count, mean, m2, selected.astype(np.int64), gate_mass, reap)

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

    def merge(self, other: Self) -> Self:
        """Moments of both texts together, part by part; exact up to float64 rounding.

        With n = n_a + n_b and d = mean_b - mean_a: mean = mean_a + d n_b / n and
        m2 = m2_a + m2_b + d d^T n_a n_b / n (Chan, Golub & LeVeque 1983, equations 2.1).
        """
        count = self.count + other.count
        divisor = np.maximum(count, 1).astype(np.float64)
        delta = other.mean - self.mean
        shift = delta * (other.count / divisor)[:, None, None]
        weight = (self.count / divisor * other.count)[:, None, None, None]
        return type(self)(
            count=count,
            mean=self.mean + shift,
            m2=self.m2 + other.m2 + weight * delta[..., :, None] * delta[..., None, :],
            selected=self.selected + other.selected,
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
                "add text or raise collect.tokens_per_source",
            )
        return self.m2 / (self.count - 1)[:, None, None, None]

    def usage(self) -> NDArray[np.float64]:
        """[P, layers, experts] share of the selections that went to each expert; a layer sums to 1."""
        total = self.selected.sum(axis=-1, keepdims=True)
        return self.selected / np.maximum(total, 1)

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
                "the router statistics hold no expert output norms: the experts were dequantised",
                "set model.experts=packed and run `nexus-ray run CONFIG --from collect`",
            )
        return self.reap / np.maximum(self.selected, 1)

    def arrays(self, prefix: str = "") -> dict[str, NDArray[np.generic]]:
        """The fields as named arrays for a safetensors file, each name with `prefix` before it."""
        return {prefix + field.name: np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[np.generic]], prefix: str = "") -> Self:
        """The inverse of `arrays`; a missing field raises KeyError."""
        return cls(**{field.name: arrays[prefix + field.name] for field in fields(cls)})  # type: ignore[arg-type]

    def save(self, path: Path) -> None:
        """Write one safetensors file atomically."""
        write_arrays(path, self.arrays())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ArtefactError: the file is missing, damaged or of another kind.
        """
        arrays = read_arrays(path)
        try:
            return cls.from_arrays(arrays)
        except KeyError as error:
            raise ArtefactError(f"{path} holds no router moments: {error} is missing", REMAKE) from error


_CHECK_BASE = "check the base model's weights, or try model.dtype=float32"
REMAKE = "run `nexus-ray collect CONFIG` again"


def write_arrays(path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Write named arrays as safetensors, atomically."""
    with atomic_file(path) as temporary:
        save_file(arrays, temporary)


def read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read named arrays from a safetensors file.

    Raises:
        ArtefactError: the file is missing or damaged.
    """
    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise ArtefactError(f"no router statistics at {path}", REMAKE) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtefactError(f"the router statistics at {path} are damaged: {error}", REMAKE) from error


def _check_finite(router_logits: Tensor, valid: Tensor) -> None:
    broken = valid[:, :, None] & ~torch.isfinite(router_logits).all(dim=-1)
    if broken.any():
        sequence, position, layer = torch.nonzero(broken)[0].tolist()
        raise DataError(
            f"router logits of layer {layer} are NaN or infinite in sequence {sequence}, token {position}",
            _CHECK_BASE,
        )


def _summed_norms(norms: ExpertNorms, chosen: Tensor, experts: int) -> NDArray[np.float64]:
    """[experts] sum of gate x output norm over the `chosen` [sequences, length] tokens."""
    rows = chosen.flatten()
    selected = norms.indices.to(chosen.device)[rows]
    values = norms.contributions.to(chosen.device)[rows].double()
    if not torch.isfinite(values).all():
        raise DataError("an expert's output is NaN or infinite", _CHECK_BASE)
    spread = torch.zeros(len(values), experts, dtype=torch.float64, device=chosen.device)
    summed: NDArray[np.float64] = spread.scatter(1, selected, values).sum(dim=0).cpu().numpy()
    return summed


def _layer_moments(logits: Tensor, experts_per_token: int) -> tuple[NDArray[np.float64], ...]:
    """(mean, m2, selected, gate_mass) of [tokens, experts] logits, which may be no tokens at all."""
    probabilities = torch.softmax(logits.double(), dim=-1)
    mean = probabilities.sum(dim=0) / max(len(logits), 1)
    centred = probabilities - mean
    top = logits.topk(experts_per_token, dim=-1)
    # scatter and sum, not bincount: its atomic additions on a GPU have no fixed order
    gates = torch.zeros_like(probabilities)
    gate_mass = gates.scatter(1, top.indices, torch.softmax(top.values.double(), dim=-1)).sum(dim=0)
    selected = gates.scatter(1, top.indices, 1.0).sum(dim=0)
    return tuple(values.cpu().numpy() for values in (mean, centred.T @ centred, selected, gate_mass))
