"""Collecting router statistics: the frozen base reads calibration text, each shard leaves its exact moments.

A shard's moments are kept as a part until the stage ends, so a killed job continues, and the parts are merged in
shard order, so the artefact has the same bytes for any number of workers.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from typing import Any

import fsspec
import numpy as np

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.cluster import map_over_pool, set_worker_threads
from nexus_ray.config import Config
from nexus_ray.data.packing import Batch, batches, pack_shard
from nexus_ray.data.sources import Shard, list_shards
from nexus_ray.errors import DataError
from nexus_ray.families import family_of
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import load_base, load_tokenizer
from nexus_ray.modeling.packed_experts import ExpertNorms
from nexus_ray.parts import Parts
from nexus_ray.router.artefact import FORMAT_VERSION, Description, RouterStatistics
from nexus_ray.router.moments import HALVES, RouterMoments
from nexus_ray.storage import digest
from nexus_ray.targets.precompute import tokenizer_digest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardWork:
    """What is read of one shard.

    Attributes:
        shard: the shard.
        sequences: how many of its sequences, from its start, are read at most.
        half: the half that its first sequence belongs to; the others alternate.
    """

    shard: Shard
    sequences: int
    half: int

    def as_row(self) -> dict[str, Any]:
        """The work as a Ray Data row."""
        return {"shard": self.shard.as_row(), "sequences": self.sequences, "half": self.half}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> ShardWork:
        """The inverse of `as_row`."""
        return cls(Shard(**row["shard"]), int(row["sequences"]), int(row["half"]))


def collect(config: Config, layout: RunLayout) -> dict[str, RouterMoments]:
    """Write the router statistics of every source's training text, continuing what an interrupted call left.

    Returns:
        The moments by source.

    Raises:
        ModelError: the base model is missing or damaged.
        DataError: a source is missing or unreadable, or the router gives NaN.
        StorageError: the file system refused.
    """
    started = time.monotonic()
    description = _describe(config)
    work = plan_work(config)
    parts = Parts(layout.router_stats.with_name("router_stats.partial"), ".safetensors")
    parts.begin(_recipe(config, description, work))
    collected = _run(config, parts, work)
    _log_speed(collected, time.monotonic() - started)
    sources = _merge_parts(parts, work, description)
    tokens = {name: moments.tokens for name, moments in sources.items()}
    statistics = RouterStatistics(description.model_copy(update={"tokens": tokens}), sources)
    statistics.save(layout.router_stats)
    parts.discard()
    return sources


def plan_work(config: Config) -> list[ShardWork]:
    """The shards to read: `collect.tokens_per_source` spread evenly over the shards of each source.

    Each shard gives the same number of whole sequences, rounded up. A source of more shards than sequences gives
    one sequence of each of as many shards as needed, at even distances.
    """
    wanted = math.ceil(config.collect.tokens_per_source / config.data.sequence_length)
    shards = list_shards(config.data, "train")
    work = []
    for name in config.data.sources:
        chosen = _evenly_spaced([shard for shard in shards if shard.source == name], wanted)
        each = math.ceil(wanted / len(chosen))
        work += [ShardWork(shard, each, number % HALVES) for number, shard in enumerate(chosen)]
    return work


class ShardCollector:
    """Actor that runs the base over the first sequences of a shard and writes the moments of its routers."""

    def __init__(self, config: Config, parts: Parts) -> None:
        set_worker_threads(config.resources)
        self.config = config
        self.parts = parts
        self.base = load_base(config.model)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Process one row of `ShardWork`."""
        work = ShardWork.from_row(row)
        moments = self._moments(work)
        moments.save(self.parts.path(work.shard))
        return {"source": work.shard.source, "tokens": moments.tokens}

    def _moments(self, work: ShardWork) -> RouterMoments:
        packed = pack_shard(work.shard, self.base.tokenizer, self.config.data.sequence_length)
        moments = RouterMoments.empty(self.base.dimensions.layers, self.base.dimensions.experts)
        first = 0
        for batch in batches(islice(packed, work.sequences), self.config.collect.batch_sequences):
            moments = moments.merge(self._batch_moments(batch, work, first))
            first += len(batch.num_tokens)
        return moments

    def _recording_norms(self) -> AbstractContextManager[list[ExpertNorms]]:
        """What packed experts add; dequantised ones, computed by transformers, do not say it."""
        if self.config.model.experts == "packed":
            return self.base.recording_expert_norms()
        return nullcontext([])

    def _batch_moments(self, batch: Batch, work: ShardWork, first: int) -> RouterMoments:
        """Moments of a batch whose first sequence has number `first` in its shard."""
        with self._recording_norms() as norms:
            _, router_logits = self.base.forward_batch(batch)
        half = (work.half + first + np.arange(len(batch.num_tokens))) % HALVES
        try:
            return RouterMoments.from_logits(
                router_logits, batch.valid, half, self.base.dimensions.experts_per_token, norms
            )
        except DataError as error:
            place = f"{work.shard.path}, shard {work.shard.index}, batch of sequences from {first}"
            raise DataError(f"{place}: {error.message}", error.hint) from error


def _run(config: Config, parts: Parts, work: list[ShardWork]) -> Counter[str]:
    """Make the missing parts; return the tokens read of each source in this call."""
    missing = {shard.index for shard in parts.missing([item.shard for item in work])}
    rows = [item.as_row() for item in work if item.shard.index in missing]
    arguments = {"config": config, "parts": parts}
    tokens: Counter[str] = Counter()
    for row in map_over_pool(ShardCollector, arguments, rows, config.resources, "collect router statistics"):
        tokens[str(row["source"])] += int(row["tokens"])
    return tokens


def _merge_parts(parts: Parts, work: list[ShardWork], description: Description) -> dict[str, RouterMoments]:
    """Moments by source, parts merged in shard order."""
    sources = {}
    for name in dict.fromkeys(item.shard.source for item in work):
        loaded = (RouterMoments.load(parts.path(item.shard)) for item in work if item.shard.source == name)
        empty = RouterMoments.empty(description.layers, description.experts)
        sources[name] = reduce(RouterMoments.merge, loaded, empty)
    return sources


def _describe(config: Config) -> Description:
    model = read_model_config(config.model.path)
    dimensions = family_of(model).dimensions(model)
    return Description(
        base_fingerprint=fingerprint(config.model.path),
        tokenizer_sha256=tokenizer_digest(load_tokenizer(config.model.path, model)),
        sequence_length=config.data.sequence_length,
        layers=dimensions.layers,
        experts=dimensions.experts,
        experts_per_token=dimensions.experts_per_token,
        tokens={},
    )


def _recipe(config: Config, description: Description, work: list[ShardWork]) -> str:
    """Digest of everything that decides the bytes of the parts."""
    return digest(
        {
            "format": FORMAT_VERSION,
            "description": description.model_dump(mode="json"),
            "model": config.model.model_dump(mode="json"),
            "batch_sequences": config.collect.batch_sequences,
            "threads": config.resources.cpus_per_worker,
            "work": [item.as_row() for item in work],
            "files": {path: _file_version(path) for path in sorted({item.shard.path for item in work})},
        }
    )


def _file_version(path: str) -> str:
    """A token that changes when the file does: size and time of change, or what the store has in their place."""
    filesystem, plain = fsspec.core.url_to_fs(path)
    return str(filesystem.ukey(plain))


def _evenly_spaced(shards: list[Shard], count: int) -> list[Shard]:
    if len(shards) <= count:
        return shards
    return [shards[index * len(shards) // count] for index in range(count)]


def _log_speed(tokens: Counter[str], seconds: float) -> None:
    total = tokens.total()
    if total:
        by_source = ", ".join(f"{name} {count:,}" for name, count in sorted(tokens.items()))
        logger.info(
            "router statistics of %s tokens (%s) in %.0f s: %.0f tokens/s",
            f"{total:,}", by_source, seconds, total / max(seconds, 1e-9),
        )  # fmt: skip
