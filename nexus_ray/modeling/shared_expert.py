"""Shared experts: one small trainable MLP beside the routed experts of every MoE layer.

`SharedExperts.attach` adds them to an unmodified transformers model with forward hooks on its MoE blocks, after
loading, so that whatever module transformers put there (the native MXFP4 path replaces the whole block) is the
one that is extended. `disabled()` gives the base model back exactly: the teacher is the student with the shared
experts switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor, Tensor], Tensor]

# Per thread and per asyncio task, so that one process can serve the base and the student at the same time.
_DISABLED: ContextVar[bool] = ContextVar("shared_experts_disabled", default=False)


@dataclass(frozen=True)
class SharedExpertShape:
    """Shape of one layer's shared expert."""

    hidden_size: int
    width: int
    token_gate: bool


class SharedExpert(nn.Module):
    """scale * gate(x) * MLP(x), with the routed experts' own activation.

    Parameters are float32 masters; the computation is in the type of the input.

    Args:
        shape: sizes, and whether there is a one-logit sigmoid gate per token.
        activation: the family's expert activation on (gate, up) projections.
        scale: initial output scale.
    """

    def __init__(self, shape: SharedExpertShape, activation: Activation, scale: float = 1.0) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(shape.hidden_size, 2 * shape.width)
        self.down_proj = nn.Linear(shape.width, shape.hidden_size)
        self.token_gate = nn.Linear(shape.hidden_size, 1) if shape.token_gate else None
        self.scale = nn.Parameter(torch.tensor(scale))
        self._activation = activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        gate, up = _linear(self.gate_up_proj, hidden_states).chunk(2, dim=-1)
        output = _linear(self.down_proj, self._activation(gate, up))
        if self.token_gate is not None:
            output = output * torch.sigmoid(_linear(self.token_gate, hidden_states))
        return output * self.scale.to(output.dtype)


def _linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return F.linear(inputs, layer.weight.to(inputs.dtype), layer.bias.to(inputs.dtype))


class SharedExperts(nn.Module):
    """The shared experts of all MoE layers of a model."""

    def __init__(self, layers: int, shape: SharedExpertShape, activation: Activation, scale: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SharedExpert(shape, activation, scale) for _ in range(layers))

    def attach(self, blocks: list[nn.Module]) -> None:
        """Add each expert's output to that of its MoE block [batch, length, hidden].

        Raises:
            ValueError: the number of blocks is not the number of shared experts.
        """
        for block, expert in zip(blocks, self.layers, strict=True):
            block.register_forward_hook(_adding(expert))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block, in this thread or task, the model computes exactly what the base does."""
        token = _DISABLED.set(True)
        try:
            yield
        finally:
            _DISABLED.reset(token)


def _adding(expert: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    """A forward hook that adds `expert(input)` to a block's output, alone or first of a tuple."""

    def hook(_block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if _DISABLED.get():
            return None
        if isinstance(output, tuple):
            return (output[0] + expert(inputs[0]), *output[1:])
        return output + expert(inputs[0])

    return hook
