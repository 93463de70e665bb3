"""Router drift: how far the student's routers have moved from the base's on the same tokens.

The routers themselves are frozen; their inputs move because the shared experts add to the residual stream.
Sums are kept per layer, so that batches and shards add up; padding never enters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_ray.router import distances


@dataclass(frozen=True)
class DriftSums:
    """Per-layer sums over tokens; `a + b` merges two sets of tokens.

    Attributes:
        tokens: tokens summed over.
        kl: [layers] KL(base || student) between full softmax router distributions, nats.
        l1: [layers] sum over experts of |base - student| probability, 0 to 2 a token.
        top_k_overlap: [layers] fraction of the base's selected experts that the student selects too.
    """

    tokens: int
    kl: NDArray[np.float64]
    l1: NDArray[np.float64]
    top_k_overlap: NDArray[np.float64]

    @classmethod
    def zero(cls, layers: int) -> DriftSums:
        """The sums over no token."""
        return cls(0, np.zeros(layers), np.zeros(layers), np.zeros(layers))

    def __add__(self, other: DriftSums) -> DriftSums:
        return DriftSums(
            self.tokens + other.tokens,
            self.kl + other.kl,
            self.l1 + other.l1,
            self.top_k_overlap + other.top_k_overlap,
        )

    def means(self) -> dict[str, list[float]]:
        """Means over tokens, a list of layers for each of `kl`, `l1`, `tv` and `top_k_overlap`.

        `tv` is the total variation distance, half of `l1`: the probability that went to other experts, 0 to 1.
        """
        assert self.tokens > 0, "drift over no token has no mean"
        sums = {"kl": self.kl, "l1": self.l1, "tv": self.l1 / 2, "top_k_overlap": self.top_k_overlap}
        return {name: [float(value) for value in values / self.tokens] for name, values in sums.items()}


def router_drift(base_logits: Tensor, student_logits: Tensor, valid: Tensor, top_k: int) -> DriftSums:
    """Compare two models' routers on one batch, in float64.

    Args:
        base_logits: [sequences, length, layers, experts] full router logits of the base.
        student_logits: the same of the student.
        valid: [sequences, length] true on tokens, false on padding.
        top_k: experts that the router selects.
    """
    valid = valid.to(base_logits.device)
    layers = base_logits.shape[2]
    sums = [
        _layer_sums(base_logits[:, :, layer][valid], student_logits[:, :, layer][valid], top_k)
        for layer in range(layers)
    ]
    table = torch.stack(sums).cpu().numpy()
    return DriftSums(int(valid.sum()), table[:, 0], table[:, 1], table[:, 2])


def _layer_sums(base: Tensor, student: Tensor, top_k: int) -> Tensor:
    """[3] KL, L1 and overlap of one layer, summed over [tokens, experts] logits."""
    base_log, student_log = base.double().log_softmax(-1), student.double().log_softmax(-1)
    kl, l1 = distances.kl(base_log, student_log).sum(), distances.l1(base_log, student_log).sum()
    both = distances.selected(base, top_k), distances.selected(student, top_k)
    return torch.stack([kl, l1, distances.overlap(*both, top_k).double().sum()])
