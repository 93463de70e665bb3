"""Shared experts: one small trainable MLP beside the routed experts of every MoE layer.

`SharedExperts.attach` adds them to an unmodified transformers model with forward hooks on its MoE blocks, after
loading, so that whatever module transformers put there (the native MXFP4 path replaces the whole block) is the
one that is extended. `disabled()` gives the base model back exactly: the teacher is the student with the shared
experts switched off.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor, Tensor], Tensor]

# Per thread and per asyncio task, so that one process can serve the base and the student at the same time.
_DISABLED: ContextVar[bool] = ContextVar("shared_experts_disabled", default=False)
_counting = threading.Lock()
_active_contexts = 0
_off_somewhere = False  # in any thread or task


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
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float32))
        self._activation = activation

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden] to [..., hidden]."""
        gate, up = _linear(self.gate_up_proj, hidden_states).chunk(2, dim=-1)
        output = _linear(self.down_proj, self._activation(gate, up))
        if self.token_gate is not None:
            output = output * torch.sigmoid(_linear(self.token_gate, hidden_states))
        return output * self.scale.to(output.dtype)

    def add_to(self, _block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """A forward hook of a MoE block: its output, alone or first of a tuple, plus this expert's, unless off."""
        if shared_experts_are_off():
            return None
        if isinstance(output, tuple):
            return (output[0] + self(inputs[0]), *output[1:])
        return output + self(inputs[0])


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
            # A bound method, not a closure: a deep copy of a model that holds both calls its own expert.
            block.register_forward_hook(cast(SharedExpert, expert).add_to)

    def disabled(self) -> AbstractContextManager[None]:
        """Within the block, in this thread or task, the model computes exactly what the base does."""
        return shared_experts_off()


def shared_experts_off() -> AbstractContextManager[None]:
    """Within the block, in this thread or task, every model with shared experts computes what its base does."""
    return shared_experts_switched(off=True)


@contextmanager
def shared_experts_switched(*, off: bool) -> Iterator[None]:
    """Within the block, in this thread or task, shared experts are off, or on, whatever they are around it."""
    token = _DISABLED.set(off)
    _count_contexts(int(off))
    try:
        yield
    finally:
        _count_contexts(-int(off))
        _DISABLED.reset(token)


def shared_experts_are_off() -> bool:
    """Whether this thread or task is within `shared_experts_off`."""
    # torch.compile cannot trace a context variable; it can a flag, so the variable is asked only when it matters.
    return _off_somewhere and _DISABLED.get()


def _count_contexts(change: int) -> None:
    global _active_contexts, _off_somewhere
    with _counting:
        _active_contexts += change
        _off_somewhere = _active_contexts > 0
