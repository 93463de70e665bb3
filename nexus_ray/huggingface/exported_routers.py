"""Trained routers in an exported model: the student's in the place of the base's, and the base's beside them.

A trained router is an ordinary tensor of the checkpoint, so that every way of computing a MoE block uses it. Its
base's is kept as `model.layers.N.base_router.*`, for when the shared experts are switched off.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from nexus_ray.checkpoints.overlay import ROUTERS, OverlayConfig, TrainedKind
from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.families import MoeFamily
from nexus_ray.modeling.trained_routers import moved

_PARAMETERS: dict[TrainedKind, tuple[str, ...]] = {"none": (), "bias": ("bias",), "all": ("bias", "weight")}


def trained_names(family: MoeFamily, layers: int, routers: TrainedKind) -> list[str]:
    """Names in the export of the trained router tensors, which take the place of the base's."""
    return [f"{family.router_name(layer)}.{name}" for layer in range(layers) for name in _PARAMETERS[routers]]


def base_names(layers: int, routers: TrainedKind) -> list[str]:
    """Names in the export of the base's routers; both tensors of each, if either was trained."""
    kept = _PARAMETERS["none" if routers == "none" else "all"]
    return [_base_name(layer, name) for layer in range(layers) for name in kept]


def exported_routers(
    base: Path, family: MoeFamily, description: OverlayConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """{name in the export: tensor in the base's type} of `trained_names` and `base_names`.

    Args:
        base: directory of the base model.
        family: its MoE family.
        description: of the overlay.
        tensors: all of the overlay's.

    Raises:
        ModelError: the base lacks a router's tensor.
    """
    added: dict[str, Tensor] = {}
    if description.routers == "none":
        return added
    with CheckpointReader(base) as reader:
        for layer in range(description.layers):
            for parameter in _PARAMETERS["all"]:
                name = f"{family.router_name(layer)}.{parameter}"
                stored = added[_base_name(layer, parameter)] = reader.read(name)
                if (difference := tensors.get(f"{ROUTERS}{layer}.{parameter}")) is not None:
                    added[name] = moved(stored, difference)
    return added


def _base_name(layer: int, parameter: str) -> str:
    return f"model.layers.{layer}.base_router.{parameter}"
