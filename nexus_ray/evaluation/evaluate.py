"""Base against student on held-out text, on Ray: one pass over the text, both models on the same batches.

This is the only place that opens `data.sources.*.heldout`. Shards are scored in parallel and merged in shard
order, so the numbers do not depend on how many workers there are.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_ray.cluster import map_over_pool, set_worker_threads
from nexus_ray.config import Config, EvaluateSection
from nexus_ray.data.packing import Batch, PackedSequence, batches, pack_shard, token_byte_lengths
from nexus_ray.data.shard_sizes import estimate_tokens
from nexus_ray.data.sources import Shard, list_shards
from nexus_ray.data.unreadable import UnreadableRows
from nexus_ray.errors import ArtefactError, ConfigError, DataError
from nexus_ray.evaluation.drift import DriftSums
from nexus_ray.evaluation.perplexity import (
    Interval,
    PairedLosses,
    bits_per_byte,
    paired_bootstrap,
    sequence_nats,
    target_bytes,
    token_perplexity,
)
from nexus_ray.evaluation.routers import DIVERGED, MomentsPair, PairedRouters
from nexus_ray.layout import RunLayout
from nexus_ray.router.comparison import as_rows
from nexus_ray.router.halves import first_half_shares, halves_of_shard

logger = logging.getLogger(__name__)
_LARGEST_NATS = 700.0  # per token; past it a perplexity is no finite number


def evaluate(config: Config, layout: RunLayout) -> dict[str, Any]:
    """Score base and student on the held-out text of every source that has some.

    Args:
        config: the run.
        layout: its paths; the trained overlay must exist.

    Returns:
        {source: {role, unreadable_rows, sequences, tokens, bytes, base, student, ratio, nats_difference,
        router_drift, router_change}} as it stands in `report.json`. `base` and `student` hold token_perplexity,
        confidence_interval, bits_per_byte and nats_per_token; every confidence_interval is [low, high];
        `router_change` holds the figures of `router/comparison.py`.

    Raises:
        ConfigError: no source has held-out text.
        DataError: a source's held-out text is shorter than two sequences.
        ArtefactError: there is no trained overlay, or it gives NaN or infinite losses or router logits.
    """
    if not layout.overlay.exists():
        raise ArtefactError(f"no trained overlay at {layout.overlay}", "run `nexus-ray train CONFIG`")
    shards, items = plan_scoring(config)
    worker = {"config": config, "overlay": layout.overlay}
    return _merge(shards, map_over_pool(PairedScorer, worker, items, config.resources, "evaluate"), config)


def plan_scoring(config: Config) -> tuple[list[Shard], list[dict[str, Any]]]:
    """The held-out shards that are read, and for each what its scorer is given.

    Router moments are kept for two halves of each source, divided by `router/halves.py` with estimated sizes.
    """
    shards = list_shards(config.data, "heldout", _sources_with_heldout(config))
    limits = _sequence_limits(shards, config.evaluate.max_sequences_per_source)
    shares = _first_half_shares(shards, limits, config.data.sequence_length)
    read = [index for index, limit in enumerate(limits) if limit != 0]
    items = [shards[index].as_row() | {"limit": limits[index], "first_half": shares[index]} for index in read]
    return [shards[index] for index in read], items


def _first_half_shares(shards: Sequence[Shard], limits: Sequence[int | None], length: int) -> list[float]:
    """How much of each shard's moments, from its beginning, counts for the first half of its source."""
    sizes = estimate_tokens(shards)
    most = np.asarray([np.inf if limit is None else limit * length for limit in limits])
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


def _sequence_limits(shards: list[Shard], limit: int | None) -> list[int | None]:
    """Sequences to take from each shard: `limit` of each source, spread evenly over its shards."""
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


class PairedScorer:
    """Actor that loads the student once and scores held-out shards with it and with its base."""

    def __init__(self, config: Config, overlay: Path) -> None:
        from nexus_ray.modeling.loading import load_student

        set_worker_threads(config.resources)
        self.config = config
        self.student = load_student(config.model, overlay)
        self.byte_lengths = token_byte_lengths(self.student.tokenizer)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score one shard row; returns lists of plain numbers, one a sequence or one a layer, and moments as bytes."""
        row = dict(row)
        limit, first_half = row.pop("limit"), float(row.pop("first_half"))
        shard = Shard(**row)
        unreadable = UnreadableRows(self.config.data.strict)
        sequences, halves = _with_halves(self._sequences(shard, limit, unreadable), first_half)
        names = (f"{number} of {shard.path}, {shard.start} to {shard.stop}" for number in itertools.count())
        parts = []
        routers = PairedRouters.zero(self.student.dimensions)
        for batch in batches(sequences, self.config.evaluate.batch_sequences):
            size = len(batch.num_tokens)
            half = np.asarray(list(itertools.islice(halves, size)))
            losses, moved = self._score(batch, half, list(itertools.islice(names, size)))
            parts.append(losses)
            routers += moved
        return _as_row(shard.index, PairedLosses.concatenate(parts), routers) | unreadable.as_row()

    def _sequences(self, shard: Shard, limit: int | None, unreadable: UnreadableRows) -> Iterator[PackedSequence]:
        data = self.config.data
        predict = data.sources[shard.source].predict
        packed = pack_shard(shard, self.student.tokenizer, data.sequence_length, unreadable.handler, predict)
        return itertools.islice(packed, limit)

    def _score(
        self, batch: Batch, half: NDArray[np.integer], names: Sequence[str]
    ) -> tuple[PairedLosses, PairedRouters]:
        with self.student.base():
            logits, base_router = self.student.forward_batch(batch)
        base_nats = sequence_nats(logits, batch)
        del logits  # a large vocabulary's logits need not be held twice
        logits, student_router = self.student.forward_batch(batch)
        losses = PairedLosses(
            base_nats,
            sequence_nats(logits, batch),
            batch.is_target.sum(axis=1),
            target_bytes(batch, self.byte_lengths),
        )
        top_k = self.student.dimensions.experts_per_token
        return losses, PairedRouters.of(base_router, student_router, batch.valid, half, top_k, names)


def _with_halves(
    sequences: Iterable[PackedSequence], first_half: float
) -> tuple[Iterable[PackedSequence], Iterator[int]]:
    """The sequences of a shard and the half of each; only a shard that is cut has to be packed to its end first."""
    if first_half in (0, 1):
        return sequences, itertools.repeat(1 - int(first_half))
    packed = list(sequences)
    num_tokens = np.asarray([sequence.num_tokens for sequence in packed], np.int32)
    return packed, iter(halves_of_shard(num_tokens, first_half).tolist())


def _as_row(shard: int, losses: PairedLosses, routers: PairedRouters) -> dict[str, Any]:
    """One shard's sums as a Ray Data row of plain lists and bytes."""
    drift = routers.drift
    return {
        "shard": shard,
        "base_nats": losses.base_nats.tolist(),
        "student_nats": losses.student_nats.tolist(),
        "targets": losses.targets.tolist(),
        "num_bytes": losses.num_bytes.tolist(),
        "drift_tokens": drift.tokens,
        "kl": drift.kl.tolist(),
        "l1": drift.l1.tolist(),
        "top_k_overlap": drift.top_k_overlap.tolist(),
        "base_moments": routers.base.to_bytes(),
        "student_moments": routers.student.to_bytes(),
    }


def _losses_of(row: dict[str, Any]) -> PairedLosses:
    return PairedLosses(
        np.asarray(row["base_nats"], np.float64),
        np.asarray(row["student_nats"], np.float64),
        np.asarray(row["targets"], np.int64),
        np.asarray(row["num_bytes"], np.int64),
    )


def _drift_of(row: dict[str, Any]) -> DriftSums:
    kl, l1, overlap = (np.asarray(row[name], np.float64) for name in ("kl", "l1", "top_k_overlap"))
    return DriftSums(int(row["drift_tokens"]), kl, l1, overlap)


def _merge(shards: Sequence[Shard], rows: Iterable[dict[str, Any]], config: Config) -> dict[str, Any]:
    """Results by source; within a source the shards are joined in their own order, not in order of arrival."""
    order: dict[str, list[int]] = {}
    for shard in shards:
        order.setdefault(shard.source, []).append(shard.index)
    source_of = {shard.index: shard.source for shard in shards}
    change = {source: MomentsPair(numbers) for source, numbers in order.items()}
    arrived = {}
    for row in rows:
        index = int(row["shard"])
        change[source_of[index]].add(index, row.pop("base_moments"), row.pop("student_moments"))
        arrived[index] = row
    by_source = {source: [arrived[index] for index in numbers] for source, numbers in order.items()}
    unreadable = _report_unreadable(by_source, config)
    return {
        source: _source_result(source, results, unreadable.total(source), config)
        | {"router_change": as_rows(change[source].compare())}
        for source, results in by_source.items()
    }


def _report_unreadable(by_source: dict[str, list[dict[str, Any]]], config: Config) -> UnreadableRows:
    unreadable = UnreadableRows(config.data.strict)
    for source, rows in by_source.items():
        for row in rows:
            unreadable.add_row(source, row)
    empty = [source for source, rows in by_source.items() if not any(len(row["targets"]) for row in rows)]
    unreadable.warn("heldout", without_text=empty)
    return unreadable


def _source_result(source: str, rows: list[dict[str, Any]], unreadable: int, config: Config) -> dict[str, Any]:
    losses = PairedLosses.concatenate([_losses_of(row) for row in rows]).with_targets()
    _check(source, losses, config)
    drifts = [_drift_of(row) for row in rows]
    drift = sum(drifts[1:], start=drifts[0])
    role = config.data.sources[source].role
    return {"role": role, "unreadable_rows": unreadable} | summarise(losses, drift, config.evaluate, config.run.seed)


def _check(source: str, losses: PairedLosses, config: Config) -> None:
    if len(losses) < 2 or losses.num_bytes.sum() == 0:
        length = config.data.sequence_length
        raise DataError(
            f"data.sources.{source}.heldout makes {len(losses)} sequences of {length} tokens with any to predict; "
            "at least 2 with text are needed for a confidence interval",
            "add held-out text or lower data.sequence_length",
        )
    _check_finite("base model", losses.base_nats, losses, source, "check the weights at model.path")
    _check_finite("student", losses.student_nats, losses, source, DIVERGED)


def _check_finite(model: str, nats: NDArray[np.float64], losses: PairedLosses, source: str, hint: str) -> None:
    worst = float((nats / losses.targets).max())
    if not worst < _LARGEST_NATS:
        raise ArtefactError(f"the {model} loses {worst} nats per token on a sequence of {source}", hint)


def summarise(losses: PairedLosses, drift: DriftSums, section: EvaluateSection, seed: int) -> dict[str, Any]:
    """The numbers of one source from its paired losses and router drift; all but its role."""
    intervals = paired_bootstrap(losses, section.bootstrap_samples, section.confidence, seed)
    targets = int(losses.targets.sum())
    # From the summed differences, not from two rounded means: equal losses give a ratio of exactly 1.
    difference = float((losses.student_nats - losses.base_nats).sum()) / targets
    return {
        "sequences": len(losses),
        "tokens": targets,
        "bytes": int(losses.num_bytes.sum()),
        "base": _model_result(losses.base_nats, losses, intervals.base),
        "student": _model_result(losses.student_nats, losses, intervals.student),
        "ratio": {"value": float(np.exp(difference)), "confidence_interval": list(intervals.ratio)},
        "nats_difference": {"value": difference, "confidence_interval": list(intervals.nats_difference)},
        "router_drift": drift.means(),
    }


def _model_result(nats: NDArray[np.float64], losses: PairedLosses, interval: Interval) -> dict[str, Any]:
    total, targets = float(nats.sum()), int(losses.targets.sum())
    return {
        "token_perplexity": token_perplexity(total, targets),
        "confidence_interval": list(interval),
        "bits_per_byte": bits_per_byte(total, int(losses.num_bytes.sum())),
        "nats_per_token": total / targets,
    }
