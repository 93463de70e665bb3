"""Initialising shared experts from the routed experts that router statistics point at.

`top1_zero`, `zero` start at the base's function: their down projection is zero. The others do not, and averages of
unaligned experts mostly cancel; they are there for comparison.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import OverlayConfig, save_overlay
from nexus_ray.checkpoints.reader import CheckpointReader, read_model_config
from nexus_ray.config import Config
from nexus_ray.console import progress
from nexus_ray.errors import ArtefactError, ConfigError
from nexus_ray.families import ExpertWeights, MoeDimensions, MoeFamily, family_of
from nexus_ray.layout import RunLayout
from nexus_ray.router.selection import ExpertRanking, Selection

logger = logging.getLogger(__name__)
_RANDOM_STD = 0.02
_WITHOUT_EXPERTS = ("zero", "random")
_ZERO_DOWN = ("zero", "top1_zero")


def experts_to_average(method: str, ranking: ExpertRanking, layer: int, top_k: int) -> list[int]:
    """The routed experts of `layer` whose mean the shared expert starts from; empty for `zero` and `random`.

    Args:
        method: `convert.initialisation`.
        ranking: experts by usage and by importance.
        layer: layer index.
        top_k: K of `pca_topK`.
    """
    if method in _WITHOUT_EXPERTS:
        return []
    if method in ("top1", "top1_zero"):
        return list(ranking.used[layer][:1])
    if method == "top1_average":
        return [ranking.used_overall]
    if method == "top4_average":
        return list(ranking.used[layer][:4])
    count = method.removeprefix("pca_top")
    return list(ranking.important[layer][: top_k if count == "K" else int(count)])


def mean_expert(family: MoeFamily, reader: CheckpointReader, layer: int, experts: Sequence[int]) -> ExpertWeights:
    """Mean of some experts of a layer in float32, reading only them, one at a time."""
    total: ExpertWeights | None = None
    for expert in experts:
        weights = family.read_expert(reader, layer, expert)
        total = weights if total is None else _add(total, weights)
    assert total is not None
    count = len(experts)
    return ExpertWeights(total.gate_up / count, total.gate_up_bias / count, total.down / count, total.down_bias / count)


def _add(left: ExpertWeights, right: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(
        left.gate_up + right.gate_up,
        left.gate_up_bias + right.gate_up_bias,
        left.down + right.down,
        left.down_bias + right.down_bias,
    )


def random_expert(hidden_size: int, width: int, generator: torch.Generator) -> ExpertWeights:
    """A small random expert: normal weights of standard deviation 0.02, zero biases."""
    return ExpertWeights(
        torch.randn(2 * width, hidden_size, generator=generator) * _RANDOM_STD,
        torch.zeros(2 * width),
        torch.randn(hidden_size, width, generator=generator) * _RANDOM_STD,
        torch.zeros(hidden_size),
    )


def layer_tensors(layer: int, weights: ExpertWeights, description: OverlayConfig) -> dict[str, Tensor]:
    """One layer's overlay tensors; the down projection is zeroed where the method says so."""
    keep = 0.0 if description.initialisation in _ZERO_DOWN else 1.0
    prefix = f"layers.{layer}"
    tensors = {
        f"{prefix}.gate_up_proj.weight": weights.gate_up,
        f"{prefix}.gate_up_proj.bias": weights.gate_up_bias,
        f"{prefix}.down_proj.weight": weights.down * keep,
        f"{prefix}.down_proj.bias": weights.down_bias * keep,
        f"{prefix}.scale": torch.tensor(description.scale),
    }
    if description.token_gate:
        tensors[f"{prefix}.token_gate.weight"] = torch.zeros(1, description.hidden_size)
        tensors[f"{prefix}.token_gate.bias"] = torch.zeros(1)
    return tensors


def convert(config: Config, layout: RunLayout) -> OverlayConfig:
    """Write the initial overlay of a run.

    Raises:
        ArtefactError: the selection is missing, or was made for a model of another shape.
        ConfigError: the width or K does not fit the model.
        ModelError: the base is missing or damaged.
    """
    model_config = read_model_config(config.model.path)
    family = family_of(model_config)
    dimensions = family.dimensions(model_config)
    description = _describe(config, dimensions, str(model_config["model_type"]))
    ranking = None
    if description.initialisation not in _WITHOUT_EXPERTS:
        ranking = _ranking(Selection.load(layout.selection), dimensions, description.base_fingerprint)
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(config.run.seed)
    with CheckpointReader(config.model.path) as reader, progress("convert", dimensions.layers) as advance:
        for layer in range(dimensions.layers):
            if ranking is None:
                weights = random_expert(description.hidden_size, description.width, generator)
            else:
                experts = experts_to_average(description.initialisation, ranking, layer, config.select.top_k)
                weights = mean_expert(family, reader, layer, experts)
            tensors |= layer_tensors(layer, weights, description)
            advance(1)
    save_overlay(layout.initial_overlay, description, tensors)
    logger.info(
        "overlay of %s parameters, initialised with %s", f"{description.parameters:,}", description.initialisation
    )
    return description


def _describe(config: Config, dimensions: MoeDimensions, model_type: str) -> OverlayConfig:
    section = config.convert
    width = section.width or dimensions.intermediate_size
    if width != dimensions.intermediate_size and section.initialisation not in _WITHOUT_EXPERTS:
        raise ConfigError(
            f"convert.width is {width}, but {section.initialisation} copies experts of width "
            f"{dimensions.intermediate_size}",
            "use convert.initialisation=zero (or random) for another width",
        )
    count = section.initialisation.removeprefix("pca_top")
    if count.isdigit() and int(count) > dimensions.experts:
        raise ConfigError(
            f"convert.initialisation is {section.initialisation}, but a layer has {dimensions.experts} experts"
        )
    return OverlayConfig(
        base_fingerprint=fingerprint(config.model.path),
        model_type=model_type,
        layers=dimensions.layers,
        hidden_size=dimensions.hidden_size,
        width=width,
        token_gate=section.token_gate,
        scale=section.scale,
        learn_scale=section.learn_scale,
        initialisation=section.initialisation,
    )


def _ranking(selection: Selection, dimensions: MoeDimensions, base_fingerprint: str) -> ExpertRanking:
    if selection.base_fingerprint != base_fingerprint or len(selection.layers) != dimensions.layers:
        raise ArtefactError(
            "selection.json was made for another base model", "run `nexus-ray run CONFIG --from collect`"
        )
    return selection.ranking()
