"""Disk that a run's artefacts take, by formula."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from nexus_ray.config import Config
from nexus_ray.planning.needs import Part
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.text import SourceText
from nexus_ray.planning.weights import OverlaySize

_FLOAT16, _FLOAT32, _FLOAT64, _ID = 2, 4, 8, 4
_HALVES = 2


def target_bytes_per_token(config: Config, sizes: ModelSizes, source: str) -> int:
    """Uncompressed bytes that a target set holds for each token of a source (`targets/format.py`).

    The token itself; where the source learns from stored output distributions, K ids and float16 log-probabilities and
    one float32 tail; where it learns from stored routers, one float16 a layer and expert.
    """
    section = config.train.sources[source]
    total = _ID
    if config.train.mode == "online":
        return total
    if section.output_kl:
        total += config.targets.top_k * (_ID + _FLOAT16) + _FLOAT32
    if section.router_kl:
        total += sizes.dimensions.layers * sizes.dimensions.experts * _FLOAT16
    return total


def target_bytes(config: Config, sizes: ModelSizes, text: Mapping[str, SourceText]) -> int:
    """Uncompressed bytes of the target set."""
    return sum(source.tokens * target_bytes_per_token(config, sizes, name) for name, source in text.items())


def checkpoint_bytes(overlay: OverlaySize) -> int:
    """A training checkpoint: trained parameters and both moments in float32."""
    return 3 * overlay.trained * _FLOAT32


def _moments_bytes(sizes: ModelSizes) -> int:
    """Router moments of one source or shard, in two halves: a covariance and a few vectors a layer, in float64."""
    experts = sizes.dimensions.experts
    return _HALVES * sizes.dimensions.layers * (experts * experts + 4 * experts) * _FLOAT64


def _sequences_collected(config: Config) -> int:
    """Of each source; a shard gives at least one."""
    return ceil(config.collect.tokens_per_source / config.data.sequence_length)


def storage_parts(
    config: Config, sizes: ModelSizes, overlay: OverlaySize, text: Mapping[str, SourceText]
) -> tuple[Part, ...]:
    """What the run directory holds at its fullest."""
    checkpoint, keep = checkpoint_bytes(overlay), config.train.keep_checkpoints
    tokens = sum(source.tokens for source in text.values())
    shards = sum(min(source.shards, _sequences_collected(config)) for source in text.values())
    return (
        Part("router statistics", len(config.data.sources) * _moments_bytes(sizes)),
        Part("statistics of shards", shards * _moments_bytes(sizes), f"of {shards:,} shards, while they are collected"),
        Part("overlays", 2 * overlay.stored_bytes, f"initial and trained, {config.convert.dtype}"),
        Part("targets", target_bytes(config, sizes, text), f"about {tokens:,} tokens, before compression"),
        Part("recovery checkpoints", (keep + 1) * checkpoint, f"{keep} kept, one more while it is written"),
        Part("best checkpoint", 2 * checkpoint, "one more while it is replaced"),
    )
