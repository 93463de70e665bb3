"""Dividing an evaluation into pieces of work: which shards are read, how much of each, and who continues prompts.

This is the only place that lists `data.sources.*.heldout`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from nexus_ray.config import Config
from nexus_ray.data.shard_sizes import estimate_tokens
from nexus_ray.data.sources import Shard, list_shards
from nexus_ray.errors import ConfigError
from nexus_ray.router.halves import first_half_shares

logger = logging.getLogger(__name__)


def plan_scoring(config: Config) -> tuple[list[Shard], list[dict[str, Any]]]:
    """The held-out shards that are read, and for each what its scorer is given.

    Router moments are kept for two halves of each source, divided by `router/halves.py` with estimated sizes. The
    first shard of a source gives the beginnings of its documents, the first of all continues the configured prompts.

    Raises:
        ConfigError: no source has held-out text.
    """
    section = config.evaluate
    shards = list_shards(config.data, "heldout", _sources_with_heldout(config))
    limits = unit_limits(shards, section.max_sequences_per_source)
    tokens = config.data.sequence_length if section.windows == "packed" else None
    shares = first_halves(shards, limits, tokens)
    read = [index for index, limit in enumerate(limits) if limit != 0]
    items = [shards[index].as_row() | {"limit": limits[index], "first_half": shares[index]} for index in read]
    for item, first in zip(items, _first_of_sources(items), strict=True):
        item |= {"samples": section.samples.per_source if first else 0, "prompts": item is items[0]}
    return [shards[index] for index in read], items


def _first_of_sources(items: Sequence[dict[str, Any]]) -> list[bool]:
    sources = [item["source"] for item in items]
    return [source not in sources[:place] for place, source in enumerate(sources)]


def first_halves(shards: Sequence[Shard], limits: Sequence[int | None], tokens: int | None) -> list[float]:
    """How much of each shard's moments, from its beginning, counts for the first half of its source.

    Args:
        shards: of all sources.
        limits: units that are taken of each; None: all.
        tokens: of a unit; None where units differ.
    """
    sizes = estimate_tokens(shards)
    most = np.asarray([np.inf if limit is None or tokens is None else limit * tokens for limit in limits])
    sources = np.asarray([shard.source for shard in shards])
    shares = np.zeros(len(shards))
    for source in np.unique(sources):
        mine = sources == source
        shares[mine] = first_half_shares(np.minimum(sizes, most)[mine])
    return [float(share) for share in shares]


def _sources_with_heldout(config: Config) -> tuple[str, ...]:
    found = []
    for name, source in config.data.sources.items():
        if source.heldout:
            found.append(name)
        else:
            logger.warning("data.sources.%s has no held-out text: it is left out of the evaluation", name)
    if not found:
        raise ConfigError("no source has held-out text to evaluate on", "set data.sources.NAME.heldout")
    return tuple(found)


def unit_limits(shards: list[Shard], limit: int | None) -> list[int | None]:
    """Units to take from each shard: `limit` of each source, spread evenly over its shards."""
    if limit is None:
        return [None] * len(shards)
    totals: dict[str, int] = {}
    for shard in shards:
        totals[shard.source] = totals.get(shard.source, 0) + 1
    seen: dict[str, int] = {}
    limits: list[int | None] = []
    for shard in shards:
        position, total = seen.get(shard.source, 0), totals[shard.source]
        limits.append(limit * (position + 1) // total - limit * position // total)
        seen[shard.source] = position + 1
    return limits
