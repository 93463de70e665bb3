"""Precomputing a target set: text in, Parquet shards of packed sequences and teacher targets out.

One shard of text becomes one file, named by what decides its bytes and written in place by the worker that made it. So
a killed run continues with the shards it lacks, a run with more text keeps those that it has, and the bytes do not
depend on the number of workers. Nothing but small records comes back to the driver.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nexus_ray.checkpoints.node_cache import local_description
from nexus_ray.cluster import map_over_pool, set_worker_threads
from nexus_ray.config import Config, ResourcesSection
from nexus_ray.data.packing import Batch, batches, pack_shard
from nexus_ray.data.unreadable import UnreadableRows
from nexus_ray.errors import DataError
from nexus_ray.layout import RunLayout
from nexus_ray.storage import Place
from nexus_ray.targets.format import Manifest, TargetFile
from nexus_ray.targets.writing import quota
from nexus_ray.targets.writing.job import PrecomputeJob, job_of_run
from nexus_ray.targets.writing.shard_file import Columns, ShardFile, writing_shard
from nexus_ray.targets.writing.shard_keys import ShardWork, plan_work
from nexus_ray.targets.writing.shard_store import ShardStore
from nexus_ray.targets.writing.teaching import EncodingTeacher

logger = logging.getLogger(__name__)


def precompute_run(config: Config, layout: RunLayout) -> Manifest:
    """Make the target set of a run; raises what `job_of_run` and `precompute` raise."""
    return precompute(job_of_run(config), layout.targets, config.resources)


def precompute(job: PrecomputeJob, output: Place, resources: ResourcesSection) -> Manifest:
    """Make the target set at `output` from the shards that are there and those that it lacks.

    Raises:
        DataError: a source is missing, unreadable or shorter than one sequence, or the model gives NaN.
        StorageError: the file system refused.
    """
    started = time.monotonic()
    work = plan_work(job, resources)
    store = ShardStore(output)
    store.begin()
    done = store.done(item.name for item in work)
    tokens = _make_missing(job, work, store, done, resources)
    chosen = _chosen(job, work, done)
    files = tuple(done[item.name].model_copy(update={"text": item.text}) for item in chosen)
    manifest = Manifest(**dict(job.header), tokenizer=str(job.tokenizer), files=files)
    _report_unreadable(job, chosen, files)
    _check_enough_text(job, manifest)
    store.commit(manifest)
    _report(job, manifest, tokens, time.monotonic() - started)
    return manifest


def _make_missing(
    job: PrecomputeJob,
    work: Sequence[ShardWork],
    store: ShardStore,
    done: dict[str, TargetFile],
    resources: ResourcesSection,
) -> int:
    """Make shards, adding them to `done`, until every source has what it needs; return the tokens of what was made."""
    if 0 < len(done) < len(work):
        logger.info("continuing: %d of %d shards are done", len(done), len(work))
    made = number = 0
    arguments = {"job": job, "store": store, "resources": resources}
    while missing := _missing(job, work, done):
        number += 1
        label = "precompute targets" + (f", round {number}" if job.max_tokens else "")
        rows = [item.as_row() | {"expected": expected} for item, expected in missing]
        amount = ("tokens", sum(expected for _, expected in missing))
        for row in map_over_pool(ShardWriter, arguments, rows, resources, label, amount, "expected"):
            made += int(row["tokens"])
        done |= {item.name: store.record(item.name) for item, _ in missing}
    return made


def _missing(
    job: PrecomputeJob, work: Sequence[ShardWork], done: Mapping[str, TargetFile]
) -> list[tuple[ShardWork, int]]:
    """Shards to make next, with the tokens to expect of each."""
    known = {name: file.tokens for name, file in done.items()}
    missing = []
    for items in _of_sources(job, work).values():
        ratio = quota.tokens_per_estimate(items, known)
        next_ones = quota.missing(items, known, _wanted(job))
        missing += [(item, quota.expected_tokens(item, ratio)) for item in next_ones]
    return missing


def _chosen(job: PrecomputeJob, work: Sequence[ShardWork], done: Mapping[str, TargetFile]) -> list[ShardWork]:
    """Shards of the target set."""
    known = {name: file.tokens for name, file in done.items()}
    of_sources = _of_sources(job, work).values()
    return [item for items in of_sources for item in quota.enough(items, known, _wanted(job))]


def _wanted(job: PrecomputeJob) -> int | None:
    """Tokens wanted of a source: at least those that `_check_enough_text` asks for."""
    return None if job.max_tokens is None else max(job.max_tokens, job.data.sequence_length)


def _of_sources(job: PrecomputeJob, work: Sequence[ShardWork]) -> dict[str, list[ShardWork]]:
    return {name: [item for item in work if item.shard.source == name] for name in job.names}


class ShardWriter:
    """Actor that packs a shard, runs the teacher over it and writes its Parquet file.

    Args:
        job: what is made.
        store: where it is made.
        resources: what this worker has.
    """

    def __init__(self, job: PrecomputeJob, store: ShardStore, resources: ResourcesSection) -> None:
        from nexus_ray.modeling.loading import load_base

        set_worker_threads(resources)
        self.job = job
        self.store = store
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(local_description(job.tokenizer))
        job.check_tokenizer(self.tokenizer)
        self.teacher = EncodingTeacher(load_base(job.teacher), job.header) if job.teacher else None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Process one `ShardWork`; the record that it leaves beside the file says that the file is complete."""
        work = ShardWork.of_row(row)
        unreadable = UnreadableRows(self.job.data.strict)
        path, header, source = self.store.path(work.name), self.job.header, work.shard.source
        with writing_shard(path, header, source, work.key, output=work.output, router=work.router) as shard:
            self._write(shard, work, unreadable)
        record = TargetFile(
            name=work.name,
            source=source,
            text=work.text,
            sequences=shard.sequences,
            tokens=shard.tokens,
            targets=shard.targets,
            output=work.output,
            router=work.router,
            bytes=shard.bytes,
            sha256=shard.sha256,
            blocks=shard.blocks,
            **unreadable.as_row(),
        )
        self.store.add(record)
        return {"tokens": record.tokens, "expected": row["expected"]}

    def _write(self, shard: ShardFile, work: ShardWork, unreadable: UnreadableRows) -> None:
        random = np.random.Generator(np.random.Philox(key=int(work.key, 16)))
        predict = self.job.data.sources[work.shard.source].predict
        length = self.job.data.sequence_length
        packed = pack_shard(work.shard, self.tokenizer, length, unreadable.handler, predict)
        for batch in batches(packed, self.job.batch_sequences):
            try:
                shard.add(batch, self._columns(batch, work, random))
            except DataError as error:
                raise DataError(f"{work.text}: {error.message}", error.hint) from error

    def _columns(self, batch: Batch, work: ShardWork, random: np.random.Generator) -> Columns:
        if self.teacher is None or not (work.output or work.router):
            return {}
        return self.teacher.columns(batch, random, output=work.output, router=work.router)


def _report_unreadable(job: PrecomputeJob, chosen: Sequence[ShardWork], files: Sequence[TargetFile]) -> None:
    """Warn of rows that were left out, those of an interrupted call among them."""
    unreadable = UnreadableRows(job.data.strict)
    for item, file in zip(chosen, files, strict=True):
        row = {"shard": item.shard.index, "unreadable": file.unreadable, "unreadable_example": file.unreadable_example}
        unreadable.add_row(file.source, row)
    unreadable.warn("train", without_text=set(job.names) - {file.source for file in files if file.tokens})


def _check_enough_text(job: PrecomputeJob, manifest: Manifest) -> None:
    """Refuse a source without a sequence or without a target, and say which have less text than was wanted."""
    for name in job.names:
        files = [file for file in manifest.files if file.source == name]
        tokens = sum(file.tokens for file in files)
        if tokens < job.data.sequence_length:
            raise DataError(
                f"data.sources.{name}.train holds {tokens} tokens, less than one sequence ({job.data.sequence_length})",
                "add text or lower data.sequence_length",
            )
        if not any(file.targets for file in files):
            raise DataError(
                f"data.sources.{name}.train holds no message of an assistant, so nothing in it is predicted",
                f"set data.sources.{name}.predict=all, or leave the source out",
            )
        if job.max_tokens is not None and tokens < job.max_tokens:
            logger.warning(
                "data.sources.%s: targets.max_tokens wants %s tokens, its text holds %s: the target set has them all; "
                "add text and run the same command: it continues",
                name, f"{job.max_tokens:,}", f"{tokens:,}",
            )  # fmt: skip


def _report(job: PrecomputeJob, manifest: Manifest, made: int, seconds: float) -> None:
    """One line a source, and one on the work of this call."""
    for name in job.names:
        files = [file for file in manifest.files if file.source == name]
        tokens, size = sum(file.tokens for file in files), sum(file.bytes for file in files)
        logger.info(
            "targets of %s: %s sequences, %s tokens in %d shards, %.1f bytes/token",
            name, f"{sum(file.sequences for file in files):,}", f"{tokens:,}", len(files), size / max(1, tokens),
        )  # fmt: skip
    if made:
        speed = made / max(seconds, 1e-9)
        logger.info("targets: %s tokens in %.0f s: %s tokens/s", f"{made:,}", seconds, f"{speed:,.0f}")
    else:
        logger.info("targets: all shards were there")
