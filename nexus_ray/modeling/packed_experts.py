"""Routed experts that stay packed: frozen MXFP4 weights with a hand-written backward.

`PackedExperts` takes the place of a GPT-OSS layer's `mlp.experts`. It keeps blocks and scales as the checkpoint
stores them (its parameters have the file's names) and dequantises one expert at a time, in forward and again in
backward; no dequantised weight outlives its use. The weights are frozen, so backward gives the gradients of the
hidden states and of the routing weights only, saves nothing but the layer's inputs, and computes the rest again, one
expert at a time. Where gradient checkpointing runs the layer again for its backward pass, the experts therefore compute
nothing: their output is only added to what follows in the layer, so no gradient depends on its value. Plain (unpacked)
checkpoints go through the same computation. Legend: T tokens, k experts a token, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nexus_ray.checkpoints.mxfp4 import BLOCK, BLOCK_BYTES, dequantise
from nexus_ray.families import MoeDimensions
from nexus_ray.memory import fresh
from nexus_ray.modeling.recomputation import recomputing

Activation = Callable[[Tensor, Tensor], Tensor]
# One dequantised expert, kept by each thread for the next one: fresh pages cost more than the values in them.
_buffers = threading.local()


@dataclass(frozen=True)
class ExpertNorms:
    """How much each selected expert of a layer added, for REAP (arXiv:2510.13999).

    Attributes:
        indices: [T, k] the selected experts.
        contributions: [T, k] float32, routing weight times the L2 norm of the expert's output.
    """

    indices: Tensor
    contributions: Tensor


def _scratch(name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, columns] memory of this thread with undefined contents; the same at every call with these arguments."""
    buffers: dict[Any, Tensor] = _buffers.__dict__
    key = (name, rows, columns, dtype, device)
    if key not in buffers:
        with torch.inference_mode(False):  # memory made in inference mode could not be used in training
            buffers[key] = fresh((rows, columns), dtype, device)
    return buffers[key]


class PackedExperts(nn.Module):
    """The routed experts of one layer, computed from packed weights.

    Args:
        dimensions: sizes of the layer.
        activation: the family's expert activation on (gate, up), each [tokens, I]; gate and up are interleaved.
        packed: MXFP4 blocks and scales; else plain matrices.
        dtype: type of the biases and of plain matrices.
    """

    def __init__(
        self, dimensions: MoeDimensions, activation: Activation, *, packed: bool, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        super().__init__()
        self.num_experts = dimensions.experts
        self.activation = activation
        self.packed = packed
        self._recorder: list[ExpertNorms] | None = None
        hidden, inner = dimensions.hidden_size, dimensions.intermediate_size
        for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            if packed:
                groups = (self.num_experts, rows, columns // BLOCK)
                self._declare(f"{name}_blocks", (*groups, BLOCK_BYTES), torch.uint8)
                self._declare(f"{name}_scales", groups, torch.uint8)
            else:
                self._declare(name, (self.num_experts, columns, rows), dtype)
            self._declare(f"{name}_bias", (self.num_experts, rows), dtype)

    def _declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        # Parameters and not buffers: DDP would send every buffer to every worker before each forward pass.
        setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """The routed experts' weighted sum.

        Args:
            hidden_states: [T, H]; computed in its type, or in autocast's where that is on.
            router_indices: [T, k] selected experts.
            routing_weights: [T, k] their weights.

        Returns:
            [T, H] in the type of `hidden_states`; zeros where the layer runs again for its backward pass.
        """
        kind = hidden_states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype
        routes = _Routes.of(router_indices, self.num_experts)
        recorded = self._recorder is not None and not recomputing()
        norms = torch.zeros_like(routing_weights, dtype=torch.float32) if recorded else None
        output = _FrozenExperts.apply(hidden_states.to(dtype), routing_weights.to(dtype), routes, self, norms)
        if self._recorder is not None and norms is not None:
            self._recorder.append(ExpertNorms(router_indices, norms))
        return output.to(hidden_states.dtype)

    @contextmanager
    def recording_norms(self, recorder: list[ExpertNorms]) -> Iterator[None]:
        """Append each forward pass's expert contributions to `recorder` within the block."""
        self._recorder = recorder
        try:
            yield
        finally:
            self._recorder = None

    def matrix(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        """[out, in] weights of one expert in `dtype`; a packed one is valid until this thread's next call."""
        if not self.packed:
            return getattr(self, name)[expert].to(dtype).T
        blocks, scales = getattr(self, f"{name}_blocks")[expert], getattr(self, f"{name}_scales")[expert]
        exact = dtype if dtype in (torch.bfloat16, torch.float32) else torch.float32
        rows, groups = scales.shape
        return dequantise(blocks, scales, exact, _scratch(name, rows, groups * BLOCK, exact, scales.device)).to(dtype)

    def bias(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        """[out] bias of one expert in `dtype`."""
        return getattr(self, f"{name}_bias")[expert].to(dtype)

    def activate(self, gate_up: Tensor) -> Tensor:
        """[tokens, 2I] interleaved projections to [tokens, I]."""
        return self.activation(gate_up[..., 0::2], gate_up[..., 1::2])


@dataclass(frozen=True)
class _Routes:
    """Tokens grouped by expert.

    Attributes:
        order: [T * k] flat (token, slot) positions, those of one expert together, in token order.
        counts: tokens of each expert.
        width: k.
    """

    order: Tensor
    counts: list[int]
    width: int

    @classmethod
    def of(cls, router_indices: Tensor, num_experts: int) -> _Routes:
        flat = router_indices.flatten()
        counts = torch.bincount(flat, minlength=num_experts)
        return cls(torch.argsort(flat, stable=True), counts.tolist(), router_indices.shape[-1])

    def by_expert(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(expert, its tokens, their slots) of each expert that has tokens."""
        start = 0
        for expert, count in enumerate(self.counts):
            positions = self.order[start : start + count]
            start += count
            if count:
                yield expert, positions // self.width, positions % self.width


class _FrozenExperts(torch.autograd.Function):
    """Weighted sum of expert MLPs whose weights have no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        routing_weights: Tensor,
        routes: _Routes,
        experts: PackedExperts,
        norms: Tensor | None,
    ) -> Tensor:
        ctx.routes, ctx.experts = routes, experts
        ctx.save_for_backward(hidden_states, routing_weights)
        if recomputing():
            return torch.zeros_like(hidden_states)
        dtype = hidden_states.dtype
        total = torch.zeros_like(hidden_states, dtype=_accumulator(dtype))
        with torch.autocast(hidden_states.device.type, enabled=False):
            for expert, tokens, slots in routes.by_expert():
                inputs = hidden_states.index_select(0, tokens)
                inner = experts.activate(_linear(experts, "gate_up_proj", expert, inputs))
                outputs = _linear(experts, "down_proj", expert, inner)
                weights = routing_weights[tokens, slots]
                total.index_add_(0, tokens, (outputs * weights.unsqueeze(-1)).to(total.dtype))
                if norms is not None:
                    norms[tokens, slots] = weights.float() * outputs.float().norm(dim=-1)
        return total.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_states, routing_weights = ctx.saved_tensors
        experts: PackedExperts = ctx.experts
        dtype = hidden_states.dtype
        output_gradient = gradients[0].to(dtype)
        inputs_gradient = torch.zeros_like(hidden_states, dtype=_accumulator(dtype))
        weights_gradient = torch.zeros_like(routing_weights)
        with torch.autocast(hidden_states.device.type, enabled=False):
            for expert, tokens, slots in ctx.routes.by_expert():
                gradient = output_gradient.index_select(0, tokens)
                gate_up_weight = experts.matrix("gate_up_proj", expert, dtype)
                inputs = hidden_states.index_select(0, tokens)
                gate_up = torch.addmm(experts.bias("gate_up_proj", expert, dtype), inputs, gate_up_weight.T)
                inner_gradient = gradient @ experts.matrix("down_proj", expert, dtype)  # of an unweighted one
                inner, gate_up_gradient = _activation_gradient(
                    experts, gate_up, inner_gradient * routing_weights[tokens, slots].unsqueeze(-1)
                )
                # <gradient, W inner + b> = <W^T gradient, inner> + <gradient, b>: no second product with W.
                along = _dot(inner_gradient, inner) + _dot(gradient, experts.bias("down_proj", expert, dtype))
                weights_gradient[tokens, slots] = along.to(dtype)
                inputs_gradient.index_add_(0, tokens, (gate_up_gradient @ gate_up_weight).to(inputs_gradient.dtype))
        return inputs_gradient.to(dtype), weights_gradient, None, None, None


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which a token's experts are summed."""
    return torch.promote_types(dtype, torch.float32)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    wide = _accumulator(left.dtype)
    return (left.to(wide) * right.to(wide)).sum(dim=-1)


def _linear(experts: PackedExperts, name: str, expert: int, inputs: Tensor) -> Tensor:
    weight = experts.matrix(name, expert, inputs.dtype)
    return torch.addmm(experts.bias(name, expert, inputs.dtype), inputs, weight.T)


def _activation_gradient(experts: PackedExperts, gate_up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The activation of `gate_up`, and the gradient of `gate_up` given that of the activation."""
    with torch.enable_grad():
        leaf = gate_up.detach().requires_grad_()
        inner = experts.activate(leaf)
    return inner.detach(), torch.autograd.grad(inner, leaf, gradient)[0]
