"""MoE families: what nexus-ray must know about a model architecture, one file a family.

A family says where the MoE blocks and routers are, how an expert's weights lie in a checkpoint, and which
activation an expert uses. Everything else in nexus-ray is the same for all of them.
"""

from __future__ import annotations

from typing import Any

from nexus_ray.errors import ModelError
from nexus_ray.families.base import ExpertParts, ExpertWeights, MoeDimensions, MoeFamily, StoredPart
from nexus_ray.families.gpt_oss import GptOss

__all__ = ["FAMILIES", "ExpertParts", "ExpertWeights", "MoeDimensions", "MoeFamily", "StoredPart", "family_of"]

FAMILIES: dict[str, MoeFamily] = {"gpt_oss": GptOss()}
_EXPORTED = "nexus_gpt_oss"


def family_of(config: dict[str, Any]) -> MoeFamily:
    """The family of a model configuration.

    Raises:
        ModelError: its `model_type` is not supported, or it is an export that already holds shared experts.
    """
    model_type = config.get("model_type")
    if model_type == _EXPORTED:
        raise ModelError(
            f"model.path: this model already contains shared experts (model_type {_EXPORTED!r}, made by "
            "`nexus-ray export`)",
            "set model.path to the base model that it was exported from",
        )
    if model_type not in FAMILIES:
        raise ModelError(
            f"model.path: model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}",
            "nexus_ray/families holds one file a family; CONTRIBUTING.md says how to add one",
        )
    return FAMILIES[str(model_type)]
