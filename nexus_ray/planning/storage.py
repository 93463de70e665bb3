"""Disk that a run's artefacts take, by formula."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from nexus_ray.config import Config
from nexus_ray.planning.needs import Part
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.target_sizes import SourceTargets
from nexus_ray.planning.weights import OverlaySize

_FLOAT16, _FLOAT32, _FLOAT64, _ID = 2, 4, 8, 4
_HALVES = 2


def checkpoint_bytes(config: Config, overlay: OverlaySize) -> int:
    """A recovery checkpoint: trained parameters in float32, the optimiser's moments, and the anchor of merges."""
    return (1 + _keeps_anchor(config)) * best_bytes(overlay) + overlay.moments


def best_bytes(overlay: OverlaySize) -> int:
    """The best weights: trained parameters in float32."""
    return overlay.trained * _FLOAT32


def _keeps_anchor(config: Config) -> bool:
    return config.train.averaging.every is not None and config.train.averaging.anchor == "previous"


def moments_bytes(sizes: ModelSizes) -> int:
    """Router moments of one source or unit (`router/moments.py`).

    In two halves, a layer each: two triangular matrices and three vectors over the experts, eight bytes a value.
    """
    experts = sizes.dimensions.experts
    return _HALVES * sizes.dimensions.layers * (experts * (experts + 1) + 3 * experts) * _FLOAT64


def _collection_parts(config: Config, sizes: ModelSizes) -> tuple[Part, ...]:
    """The statistics, what they are made from, and the parts that they are merged from."""
    section, dimensions = config.collect, sizes.dimensions
    sources = len(section.mixture or config.data.sources)
    sequences = ceil(section.tokens / config.data.sequence_length) + _HALVES * sources
    units = sources + sequences // (section.batch_sequences * section.unit_batches)
    exported = section.export_probabilities * dimensions.layers * dimensions.experts * _FLOAT16
    parts = (
        Part("calibration text", sequences * config.data.sequence_length * _ID, f"about {section.tokens:,} tokens"),
        Part("router statistics", sources * moments_bytes(sizes)),
        Part("statistics of units", units * moments_bytes(sizes), f"of {units:,} units, while they are collected"),
        Part("router probabilities", 2 * exported, "exported, and their parts"),
    )
    return tuple(part for part in parts if part.size)


def storage_parts(
    config: Config, sizes: ModelSizes, overlay: OverlaySize, targets: Mapping[str, SourceTargets]
) -> tuple[Part, ...]:
    """What the run directory holds at its fullest."""
    checkpoint, keep = checkpoint_bytes(config, overlay), config.train.keep_checkpoints
    tokens = sum(source.tokens for source in targets.values())
    stored = sum(source.stored_bytes for source in targets.values())
    return (
        *_collection_parts(config, sizes),
        Part("overlays", 2 * overlay.stored_bytes, f"initial and trained, {config.convert.dtype}"),
        Part("targets", stored, f"about {tokens:,} tokens, before compression"),
        Part("recovery checkpoints", (keep + 1) * checkpoint, f"{keep} kept, one more while it is written"),
        Part("best weights", 2 * best_bytes(overlay), "once more while they are replaced"),
    )
