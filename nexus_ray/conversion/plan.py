"""What a conversion will read and write, from the configuration, the selection and the checkpoint's headers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import OverlayConfig, overlay_specs
from nexus_ray.checkpoints.reader import CheckpointReader, read_model_config
from nexus_ray.config import Config
from nexus_ray.errors import ArtefactError, ConfigError, ModelError
from nexus_ray.families import ExpertParts, MoeDimensions, MoeFamily, family_of
from nexus_ray.layout import RunLayout
from nexus_ray.selection.record import ExpertRanking, Selection
from nexus_ray.storage import Place

_WITHOUT_EXPERTS = ("zero", "random")
_MOST_USED = ("top1", "top1_zero", "lstsq")


@dataclass(frozen=True)
class ConversionPlan:
    """What `convert` does.

    Attributes:
        description: of the overlay.
        family: of the base.
        dimensions: of the base.
        experts: the routed experts that each layer's shared expert is made from, best first; may be empty.
        expert_bytes: bytes of the checkpoint that each layer's experts are read from.
        directory: where the overlay goes.
    """

    description: OverlayConfig
    family: MoeFamily
    dimensions: MoeDimensions
    experts: tuple[tuple[int, ...], ...]
    expert_bytes: tuple[int, ...]
    directory: Place

    @property
    def bytes_written(self) -> int:
        """Bytes of the overlay's tensors."""
        return sum(spec.nbytes for spec in overlay_specs(self.description))


def plan_conversion(config: Config, layout: RunLayout) -> ConversionPlan:
    """Decide what each layer's shared expert is made from, without reading weights.

    Raises:
        ArtefactError: the selection is missing, was made for another model or lacks what the method needs.
        ConfigError: the method asks for more experts than a layer has.
        ModelError: the base is missing, damaged, already converted or does not have the shape it describes.
    """
    model_config = read_model_config(config.model.path)
    family = family_of(model_config)
    dimensions = family.dimensions(model_config)
    description = describe_overlay(config, dimensions, str(model_config["model_type"]), fingerprint(config.model.path))
    experts = _choose_experts(config, layout, dimensions, description)
    with CheckpointReader(config.model.path) as reader:
        stored = [_checked_parts(family, reader, layer, dimensions).stored_bytes for layer in range(len(experts))]
    return ConversionPlan(
        description=description,
        family=family,
        dimensions=dimensions,
        experts=tuple(tuple(layer) for layer in experts),
        expert_bytes=tuple(size * len(layer) for size, layer in zip(stored, experts, strict=True)),
        directory=layout.initial_overlay,
    )


def experts_to_average(method: str, ranking: ExpertRanking, layer: int) -> list[int]:
    """The routed experts of `layer` that the shared expert is made from, best first; empty for `zero` and `random`.

    Args:
        method: `convert.initialisation`.
        ranking: experts by usage, importance and saliency; K of `pca_topK`, `aligned_topK` and `reap_topK` is the
            layer's count in it.
        layer: layer index.

    Raises:
        ArtefactError: `reap_topK` without saliencies.
    """
    if method in _WITHOUT_EXPERTS:
        return []
    if method in _MOST_USED:
        return list(ranking.used[layer][:1])
    if method == "top1_average":
        return [ranking.used_overall]
    if method == "top4_average":
        return list(ranking.used[layer][:4])
    order, _, count = method.partition("_top")
    return list(_ranked(order, ranking)[layer][: ranking.counts[layer] if count == "K" else int(count)])


def plan_table(plan: ConversionPlan) -> Table:
    """The plan for people, one row a layer."""
    described = plan.description
    table = Table(
        title=f"convert ({described.initialisation}): {described.parameters:,} parameters to {plan.directory}",
        caption=f"reads {sum(plan.expert_bytes):,} bytes of experts, writes {plan.bytes_written:,} bytes "
        f"({described.dtype}, width {described.width}); nothing has been written",
    )
    for heading, justify in (("layer", "right"), ("experts", "left"), ("bytes read", "right"), ("written", "right")):
        table.add_column(heading, justify="left" if justify == "left" else "right", no_wrap=justify == "right")
    written = plan.bytes_written // max(described.layers, 1)
    for layer, (experts, size) in enumerate(zip(plan.experts, plan.expert_bytes, strict=True)):
        table.add_row(str(layer), " ".join(map(str, experts)) or "none", f"{size:,}", f"{written:,}")
    return table


def _ranked(order: str, ranking: ExpertRanking) -> Sequence[Sequence[int]]:
    if order != "reap":
        return ranking.important
    if ranking.reap is None:
        raise ArtefactError(
            "convert.initialisation ranks experts by REAP, but the router statistics hold no expert output norms",
            "set model.experts=packed and run `nexus-ray run CONFIG --from collect`, or use pca_topK",
        )
    return ranking.reap


def describe_overlay(config: Config, dimensions: MoeDimensions, model_type: str, base: str) -> OverlayConfig:
    """The overlay that `convert` is asked for, of a base with these dimensions and this fingerprint."""
    section = config.convert
    return OverlayConfig(
        base_fingerprint=base,
        model_type=model_type,
        layers=dimensions.layers,
        hidden_size=dimensions.hidden_size,
        width=section.width or dimensions.intermediate_size,
        token_gate=section.token_gate,
        scale=section.scale,
        learn_scale=section.learn_scale,
        initialisation=section.initialisation,
        dtype=section.dtype,
    )


def _choose_experts(
    config: Config, layout: RunLayout, dimensions: MoeDimensions, description: OverlayConfig
) -> list[list[int]]:
    method = description.initialisation
    if method in _WITHOUT_EXPERTS:
        return [[] for _ in range(dimensions.layers)]
    _check_count(method, dimensions.experts)
    ranking = _ranking(Selection.load(layout.selection), dimensions, description.base_fingerprint)
    return [experts_to_average(method, ranking, layer) for layer in range(dimensions.layers)]


def _check_count(method: str, experts: int) -> None:
    count = method.partition("_top")[2]
    if count.isdigit() and int(count) > experts:
        raise ConfigError(
            f"convert.initialisation is {method}, which takes {count} experts, but a layer has {experts} experts",
            f"use at most {experts} experts",
        )


def _ranking(selection: Selection, dimensions: MoeDimensions, base_fingerprint: str) -> ExpertRanking:
    if selection.base_fingerprint != base_fingerprint or len(selection.layers) != dimensions.layers:
        raise ArtefactError(
            "selection.json was made for another base model", "run `nexus-ray run CONFIG --from collect`"
        )
    return selection.ranking()


def _checked_parts(family: MoeFamily, reader: CheckpointReader, layer: int, dimensions: MoeDimensions) -> ExpertParts:
    """The parts of a layer, if they have the shapes that `config.json` promises.

    Raises:
        ModelError: they have not; names the tensor.
    """
    hidden, width = dimensions.hidden_size, dimensions.intermediate_size
    parts = family.expert_parts(reader, layer)
    expected = ((2 * width, hidden), (2 * width,), (hidden, width), (hidden,))
    for part, shape in zip(parts, expected, strict=True):
        found = tuple(part.arrange(torch.empty(part.shape, device="meta")).shape)
        if found != shape or part.experts != dimensions.experts:
            raise ModelError(
                f"{part.name} holds {part.experts} experts of {list(found)}, but config.json describes "
                f"{dimensions.experts} of {list(shape)}",
                "the checkpoint is damaged, or config.json belongs to another model: download the model again",
            )
    return parts
