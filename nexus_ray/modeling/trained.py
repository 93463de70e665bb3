"""What of a student is trained: the one place that says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from nexus_ray.checkpoints.overlay import ROUTERS, TrainedKind

if TYPE_CHECKING:
    from nexus_ray.modeling.loading import LoadedModel


def is_trained(name: str, *, learn_scale: bool, routers: TrainedKind) -> bool:
    """Whether training changes the overlay's tensor of this name.

    Args:
        name: in an overlay.
        learn_scale: output scales of shared experts are trained.
        routers: which differences of routers are.
    """
    if name.startswith(ROUTERS):
        return routers == "all" or (routers == "bias" and name.endswith(".bias"))
    return learn_scale or not name.endswith(".scale")


def overlay_parameters(student: LoadedModel) -> dict[str, nn.Parameter]:
    """All parameters that an overlay added to a model, by their names in overlays; empty for a plain base."""
    added = (module for module in (student.shared_experts, student.routers) if module is not None)
    return {name: parameter for module in added for name, parameter in module.named_parameters()}


def trained_parameters(student: LoadedModel, routers: TrainedKind = "none") -> dict[str, nn.Parameter]:
    """The parameters that training changes, by their names in overlays; from now on they alone have gradients.

    Args:
        student: a base with an overlay.
        routers: which differences of its routers to train, which `LoadedModel.train_routers` must have attached.
    """
    assert student.overlay is not None
    learn_scale = student.overlay.learn_scale
    trained = {}
    for name, parameter in overlay_parameters(student).items():
        parameter.requires_grad_(is_trained(name, learn_scale=learn_scale, routers=routers))
        if parameter.requires_grad:
            trained[name] = parameter
    return trained
