"""Trained routers: float32 differences from the base's router parameters, one pair a layer.

`TrainedRouters.attach` adds them to an unmodified transformers model with forward hooks on its routers, which stay as
they are: a hook routes again with base + difference, rounded to the type that the base computes in, so that an
exported router is the trained one. With the shared experts off the routers are the base's bit for bit, so the teacher
routes as it always did.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from nexus_ray.checkpoints.overlay import ROUTERS, OverlayConfig, TrainedKind
from nexus_ray.errors import ArtefactError
from nexus_ray.families import MoeFamily
from nexus_ray.modeling.shared_expert import shared_experts_are_off


class TrainedRouter(nn.Module):
    """The difference of one layer's router from the base's, zero at the start.

    Attributes:
        bias: [experts] float32.
        weight: [experts, hidden] float32, or None.
        shape: of the router's weight.

    Args:
        experts: number of routed experts.
        hidden_size: features that the router reads.
        family: how it routes.
        weights: there is one of the weight too, not only of the bias.
    """

    def __init__(self, experts: int, hidden_size: int, family: MoeFamily, *, weights: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(experts))
        self.weight: nn.Parameter | None
        self.register_parameter("weight", nn.Parameter(torch.zeros(experts, hidden_size)) if weights else None)
        self.shape = (experts, hidden_size)
        self._family = family

    def add_weight(self) -> None:
        """Give it a difference of the weight, zero, unless it has one."""
        if self.weight is None:
            self.weight = nn.Parameter(torch.zeros(self.shape, device=self.bias.device), requires_grad=False)

    def reroute(self, router: nn.Module, inputs: tuple[Any, ...], _output: Any) -> Any:
        """A forward hook of a router: what it would return with its parameters moved by the difference, unless off."""
        if shared_experts_are_off():
            return None
        weight, bias = cast(Tensor, router.weight), cast(Tensor, router.bias)
        if self.weight is not None:
            weight = moved(weight, self.weight)
        return self._family.route(router, inputs[0], weight, moved(bias, self.bias))


def moved(base: Tensor, difference: Tensor) -> Tensor:
    """base + difference, added in the wider of their types and rounded to the base's."""
    return (base + difference.to(base.device)).to(base.dtype)


class TrainedRouters(nn.Module):
    """The router differences of all MoE layers of a model; parameters `routers.N.weight` and `routers.N.bias`.

    Args:
        description: of an overlay with routers.
        family: of its base.
    """

    def __init__(self, description: OverlayConfig, family: MoeFamily) -> None:
        super().__init__()
        assert description.experts is not None
        experts, hidden, weights = description.experts, description.hidden_size, description.routers == "all"
        layers = range(description.layers)
        self.routers = nn.ModuleList(TrainedRouter(experts, hidden, family, weights=weights) for _ in layers)
        self.requires_grad_(False)

    def attach(self, routers: list[nn.Module]) -> None:
        """Let each router of a model route with its difference, which moves to the router's device.

        Raises:
            ArtefactError: the differences are of routers of another size.
            ValueError: the number of routers is not that of the differences.
        """
        self.fit(routers)
        for router, difference in zip(routers, self.routers, strict=True):
            # First of all hooks, so that one which records the router's output sees the student's.
            router.register_forward_hook(cast(TrainedRouter, difference).reroute, prepend=True)

    def fit(self, routers: list[nn.Module]) -> None:
        """Check that the differences are of routers of this size, and move each to its router's device.

        Raises:
            ArtefactError, ValueError: as `attach`.
        """
        for router, difference in zip(routers, self.routers, strict=True):
            weight, trained = cast(Tensor, router.weight), cast(TrainedRouter, difference)
            if weight.shape != trained.shape:
                raise ArtefactError(
                    f"the overlay is for routers of {list(trained.shape)} weights, model.path has {list(weight.shape)}",
                    "its overlay_config.json is damaged: make a new overlay with `nexus-ray run CONFIG`",
                )
            trained.to(weight.device)

    def widen(self, routers: TrainedKind) -> None:
        """Add differences of zero for the weights if `routers` is "all" and there are none."""
        if routers == "all":
            for router in self.routers:
                cast(TrainedRouter, router).add_weight()


def load_trained_routers(description: OverlayConfig, tensors: dict[str, Tensor], family: MoeFamily) -> TrainedRouters:
    """The router differences among the tensors of an overlay that has some; frozen but for training.

    Args:
        description: the overlay's description.
        tensors: all of its tensors, which `load_overlay` has checked.
        family: of its base.
    """
    routers = TrainedRouters(description, family)
    routers.load_state_dict({name: tensor for name, tensor in tensors.items() if name.startswith(ROUTERS)})
    return routers
