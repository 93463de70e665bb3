"""The interface of a MoE family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from nexus_ray.checkpoints.reader import CheckpointReader


@dataclass(frozen=True)
class MoeDimensions:
    """Sizes that decide the shape of shared experts and router statistics."""

    layers: int
    experts: int
    experts_per_token: int
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True)
class ExpertWeights:
    """One expert as float32 matrices in `nn.Linear` layout.

    Attributes:
        gate_up: [2 * intermediate, hidden]; the gate's rows, then the up projection's.
        gate_up_bias: [2 * intermediate].
        down: [hidden, intermediate].
        down_bias: [hidden].
    """

    gate_up: Tensor
    gate_up_bias: Tensor
    down: Tensor
    down_bias: Tensor


class MoeFamily(Protocol):
    """What differs between MoE architectures."""

    def dimensions(self, config: dict[str, Any]) -> MoeDimensions:
        """Sizes from `config.json`."""
        ...

    def moe_blocks(self, model: nn.Module) -> list[nn.Module]:
        """The MoE block of each layer: the module that maps hidden states to hidden states."""
        ...

    def routers(self, model: nn.Module) -> list[nn.Module]:
        """The router of each layer."""
        ...

    def router_logits(self, output: Any) -> Tensor:
        """[tokens, experts] logits over all experts from what a router module returns."""
        ...

    def expert_activation(self, gate: Tensor, up: Tensor, config: dict[str, Any]) -> Tensor:
        """The expert's nonlinearity on its two projections [..., intermediate]."""
        ...

    def read_expert(self, reader: CheckpointReader, layer: int, expert: int) -> ExpertWeights:
        """Read one expert of one layer, and nothing else, from a checkpoint."""
        ...
