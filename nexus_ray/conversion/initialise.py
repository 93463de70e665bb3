"""Initialising shared experts from the routed experts that router statistics point at.

`zero` and `top1_zero` start at the base's function: their down projection is zero. The others do not. A plain mean
(`top4_average`, `pca_topK`, `reap_topK`) mostly cancels what the experts have learned, because their neurons stand in
different orders; `aligned_topK` puts them in one order first. `lstsq` makes a second copy of what the routed
experts give, so an output scale far below 1 (`convert.scale=0.1`) belongs to it.

Layers are made and written one after the other, so memory is that of one layer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nexus_ray.checkpoints.overlay import OverlayConfig, OverlayWriter
from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.config import Config
from nexus_ray.console import progress
from nexus_ray.conversion.alignment import aligned_mean
from nexus_ray.conversion.averaging import mean_expert
from nexus_ray.conversion.plan import ConversionPlan, plan_conversion
from nexus_ray.conversion.width import random_expert, resize
from nexus_ray.families import ExpertWeights
from nexus_ray.layout import RunLayout
from nexus_ray.storage import write_json

logger = logging.getLogger(__name__)
_ZERO_DOWN = ("zero", "top1_zero")


def convert(config: Config, layout: RunLayout) -> OverlayConfig:
    """Write the initial overlay of a run, and beside it `convert.json`: what it was made from.

    Raises:
        ArtefactError: the selection is missing, was made for a model of another shape or lacks what is needed.
        ConfigError: the method asks for more experts than a layer has.
        DataError: `lstsq` finds no calibration text.
        ModelError: the base is missing, damaged or already converted.
        StorageError: the file system refused; the base and an earlier overlay stay as they were.
    """
    started = time.monotonic()
    plan = plan_conversion(config, layout)
    explained: list[float] = []
    with (
        OverlayWriter(plan.directory, plan.description, config.convert.shard_bytes) as writer,
        progress("convert", plan.description.layers) as advance,
    ):

        def emit(layer: int, weights: ExpertWeights) -> None:
            for name, tensor in layer_tensors(layer, weights, plan.description).items():
                writer.write(name, tensor)
            advance(1)

        if plan.description.initialisation == "lstsq":
            from nexus_ray.conversion.fitting import fit_layers

            explained = fit_layers(config, plan, layout.calibration, emit)
        else:
            _make_layers(config, plan, emit)
    write_json(layout.conversion, _record(plan, explained, time.monotonic() - started))
    logger.info(
        "overlay of %s parameters, initialised with %s from %s bytes of experts",
        f"{plan.description.parameters:,}", plan.description.initialisation, f"{sum(plan.expert_bytes):,}",
    )  # fmt: skip
    return plan.description


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


def _make_layers(config: Config, plan: ConversionPlan, emit: Callable[[int, ExpertWeights], None]) -> None:
    """Make the shared expert of each layer from its routed experts alone, in layer order."""
    generator = torch.Generator().manual_seed(config.run.seed)
    with CheckpointReader(config.model.path) as reader:
        for layer in range(plan.description.layers):
            emit(layer, _make_layer(reader, plan, layer, generator))


def _make_layer(
    reader: CheckpointReader, plan: ConversionPlan, layer: int, generator: torch.Generator
) -> ExpertWeights:
    description, experts = plan.description, plan.experts[layer]
    if not experts:
        return random_expert(description.hidden_size, description.width, generator)
    parts = plan.family.expert_parts(reader, layer)
    if description.initialisation.startswith("aligned_"):
        weights = aligned_mean(mean_expert(parts, [expert]) for expert in experts)
    else:
        weights = mean_expert(parts, experts)
    return resize(weights, description.width, generator)


def _record(plan: ConversionPlan, explained: list[float], seconds: float) -> dict[str, object]:
    """`convert.json`: per layer the experts, bytes read and, for `lstsq`, the explained share of the variance."""
    shares: Sequence[float | None] = explained or [None] * len(plan.experts)
    return {
        "initialisation": plan.description.initialisation,
        "base_fingerprint": plan.description.base_fingerprint,
        "parameters": plan.description.parameters,
        "bytes_written": plan.bytes_written,
        "seconds": round(seconds, 2),
        "layers": [
            {"experts": list(experts), "bytes_read": size, "explained_variance": share}
            for experts, size, share in zip(plan.experts, plan.expert_bytes, shares, strict=True)
        ],
    }
