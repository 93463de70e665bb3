"""The interface of a MoE family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

    @property
    def width(self) -> int:
        """Number of intermediate neurons."""
        return int(self.down.shape[1])


@dataclass(frozen=True)
class StoredPart:
    """One array of a layer's experts as it lies in a checkpoint, readable by rows without reading the rest.

    Attributes:
        name: of the tensor, for messages.
        experts: how many the tensor holds.
        shape: of one expert's array in storage order, its rows first.
        stored_bytes: that one expert's array takes in the file.
        read_rows: (expert, start, stop) -> [stop - start, ...] float32 rows in storage order.
        arrange: storage order [*shape] -> the layout of `ExpertWeights`; a linear map that only moves elements,
            so that a mean may be taken before it.
    """

    name: str
    experts: int
    shape: tuple[int, ...]
    stored_bytes: int
    read_rows: Callable[[int, int, int], Tensor]
    arrange: Callable[[Tensor], Tensor]

    def read(self, expert: int) -> Tensor:
        """One expert's whole array in the layout of `ExpertWeights`."""
        return self.arrange(self.read_rows(expert, 0, self.shape[0]))


@dataclass(frozen=True)
class ExpertParts:
    """The four arrays of a layer's experts in a checkpoint, in the order of `ExpertWeights`."""

    gate_up: StoredPart
    gate_up_bias: StoredPart
    down: StoredPart
    down_bias: StoredPart

    def __iter__(self) -> Iterator[StoredPart]:
        return iter((self.gate_up, self.gate_up_bias, self.down, self.down_bias))

    @property
    def stored_bytes(self) -> int:
        """Bytes that one whole expert takes in the file."""
        return sum(part.stored_bytes for part in self)


class MoeFamily(Protocol):
    """What differs between MoE architectures; a family inherits from it."""

    def dimensions(self, config: dict[str, Any]) -> MoeDimensions:
        """Sizes from `config.json`.

        Raises:
            ModelError: a field is missing or not a number.
        """
        ...

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The decoder layers, in order."""
        ...

    def moe_blocks(self, model: nn.Module) -> list[nn.Module]:
        """The MoE block of each layer: the module that maps hidden states to hidden states."""
        ...

    def routers(self, model: nn.Module) -> list[nn.Module]:
        """The router of each layer."""
        ...

    def router_name(self, layer: int) -> str:
        """Name of a layer's router in a checkpoint, whose tensors are `<name>.weight` and `<name>.bias`."""
        ...

    def router_logits(self, output: Any) -> Tensor:
        """[tokens, experts] logits over all experts from what a router module returns."""
        ...

    def route(self, router: nn.Module, hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Any:
        """What the router would return if it had other parameters, bit for bit.

        Args:
            router: of a layer.
            hidden_states: [tokens, hidden], as the router gets them.
            weight: [experts, hidden] in place of its `weight`.
            bias: [experts] in place of its `bias`.
        """
        ...

    def expert_activation(self, gate: Tensor, up: Tensor, config: dict[str, Any]) -> Tensor:
        """The expert's nonlinearity on its two projections [..., intermediate]."""
        ...

    def expert_parts(self, reader: CheckpointReader, layer: int) -> ExpertParts:
        """Where the experts of a layer lie in a checkpoint; reads headers only.

        Raises:
            ModelError: a tensor is missing.
        """
        ...

    def read_expert(self, reader: CheckpointReader, layer: int, expert: int) -> ExpertWeights:
        """Read one expert of one layer, and nothing else, from a checkpoint."""
        return ExpertWeights(*(part.read(expert) for part in self.expert_parts(reader, layer)))
