"""Adapting a few routed experts: by low-rank matrices (MoE-Sieve, arXiv:2603.24044) or whole (ESFT, arXiv:2407.01906).

PEFT adapts all experts of a layer or none, since they are one tensor. Legend: T tokens, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

PROJECTIONS = ("gate_up_proj", "down_proj")
Addition = Callable[[int, int], nn.Module]


class LowRank(nn.Module):
    """alpha / rank * B A x, with B zero and A uniform at the start (Hu et al., 2021, arXiv:2106.09685).

    Args:
        inputs: features of x.
        outputs: features of the result.
        rank: of the product.
        alpha: scale of the result, times the rank.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.a = nn.Linear(inputs, rank, bias=False)
        self.b = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.b.weight)
        self.scale = alpha / rank

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return cast(Tensor, self.b(self.a(inputs))) * self.scale


def whole(inputs: int, outputs: int) -> nn.Module:
    """A matrix and a bias that start at zero: what training adds to those of the expert."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class AdaptedExperts(nn.Module):
    """The routed experts of a GPT-OSS layer, some with trained additions to their projections.

    Args:
        experts: transformers' dequantised experts, which stay frozen.
        selected: the experts that get additions.
        addition: (inputs, outputs) -> a module that is added to a projection.
    """

    def __init__(self, experts: nn.Module, selected: Iterable[int], addition: Addition) -> None:
        super().__init__()
        self.frozen = experts
        self.additions = nn.ModuleDict(
            {
                str(expert): nn.ModuleDict(
                    {name: addition(*cast(Tensor, getattr(experts, name)).shape[1:]) for name in PROJECTIONS}
                )
                for expert in selected
            }
        )

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """The experts' weighted sum.

        Args:
            hidden_states: [T, hidden].
            router_indices: [T, k] selected experts.
            routing_weights: [T, k] their weights.

        Returns:
            [T, hidden].
        """
        total = torch.zeros_like(hidden_states)
        for expert in router_indices.unique().tolist():
            tokens, slots = torch.where(router_indices == expert)
            inner = self._activate(self._project("gate_up_proj", expert, hidden_states[tokens]))
            outputs = self._project("down_proj", expert, inner)
            total = total.index_add(0, tokens, outputs * routing_weights[tokens, slots, None])
        return total

    def _activate(self, gate_up: Tensor) -> Tensor:
        return cast(Tensor, self.frozen._apply_gate(gate_up))  # type: ignore[operator]

    def _project(self, name: str, expert: int, inputs: Tensor) -> Tensor:
        weight, bias = getattr(self.frozen, name)[expert], getattr(self.frozen, f"{name}_bias")[expert]
        outputs = torch.addmm(bias, inputs, weight)
        if str(expert) not in self.additions:
            return outputs
        own = cast(nn.ModuleDict, self.additions[str(expert)])
        return outputs + cast(Tensor, own[name](inputs))
