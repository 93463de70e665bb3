"""Precomputing a target set: text in, Parquet files of packed sequences and teacher targets out.

One shard of text becomes one Parquet file, so a killed run continues with the shards it lacks, and the bytes do
not depend on the number of workers. Without a teacher (online distillation, pretraining) only the sequences are
written.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.cluster import map_over_pool, set_worker_threads
from nexus_ray.config import Config, DataSection, ModelSection, ResourcesSection, TargetsSection
from nexus_ray.data.packing import Batch, batches, pack_shard
from nexus_ray.data.sources import Shard, list_shards
from nexus_ray.data.unreadable import UnreadableRows
from nexus_ray.data.vocabulary import tokenizer_digest
from nexus_ray.errors import DataError
from nexus_ray.layout import RunLayout
from nexus_ray.parts import Parts
from nexus_ray.storage import read_json, replace_directory, sha256_file, write_json
from nexus_ray.targets.compression import compress
from nexus_ray.targets.format import Manifest, TargetFile, write_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherPlan:
    """Which targets the teacher computes.

    Attributes:
        model: the base model.
        targets: how distributions are compressed.
        output_sources: sources whose rows get next-token targets.
        router_sources: sources whose rows get router logits.
    """

    model: ModelSection
    targets: TargetsSection
    output_sources: frozenset[str]
    router_sources: frozenset[str]

    @property
    def sources(self) -> frozenset[str]:
        """Sources that need a teacher pass at all."""
        return self.output_sources | self.router_sources


@dataclass(frozen=True)
class PrecomputeJob:
    """One target set to make.

    Attributes:
        data: text sources and sequence length.
        names: the sources to pack, in order.
        tokenizer: directory of the tokenizer.
        teacher: None packs the text only.
        base_fingerprint: identity of the base model, None without one.
        recipe: digest of everything that decides the bytes; parts of another recipe are discarded.
    """

    data: DataSection
    names: tuple[str, ...]
    tokenizer: Path
    teacher: TeacherPlan | None
    base_fingerprint: str | None
    recipe: str


def precompute_run(config: Config, layout: RunLayout, recipe: str) -> Manifest:
    """Make the target set of a run: stored targets for offline training, sequences only for online training.

    Args:
        config: the run.
        layout: its paths.
        recipe: digest of everything that decides the targets.
    """
    teacher = None
    if config.train.mode == "offline":
        sections = config.train.sources.items()
        teacher = TeacherPlan(
            model=config.model,
            targets=config.targets,
            output_sources=frozenset(name for name, section in sections if section.output_kl),
            router_sources=frozenset(name for name, section in sections if section.router_kl),
        )
    names = tuple(config.train.sources)
    identity = fingerprint(config.model.path)
    job = PrecomputeJob(config.data, names, config.model.path, teacher, identity, recipe)
    return precompute(job, layout.targets, config.resources)


def precompute(job: PrecomputeJob, output: Path, resources: ResourcesSection) -> Manifest:
    """Make the target set at `output`, continuing with what an interrupted call left.

    Raises:
        DataError: a source is missing, unreadable or shorter than one sequence.
        StorageError: the file system refused.
    """
    shards = list_shards(job.data, "train", job.names)
    parts = Parts(output.with_name(output.name + ".partial"), ".json")
    parts.begin(job.recipe)
    arguments = {"job": job, "parts": parts, "resources": resources}
    missing = [shard.as_row() for shard in parts.missing(shards)]
    for _ in map_over_pool(ShardWriter, arguments, missing, resources, "precompute targets"):
        pass
    records = [read_json(parts.path(shard), what="shard record", hint="run again") for shard in shards]
    _report_unreadable(job, shards, records)
    manifest = _manifest(job, [record["file"] for record in records])
    _check_enough_text(manifest, job)
    manifest.save(parts.directory)
    parts.finish()
    for shard in shards:
        parts.path(shard).unlink()
    replace_directory(parts.directory, output)
    return manifest


class ShardWriter:
    """Actor that packs a shard, runs the teacher over it and writes its Parquet file."""

    def __init__(self, job: PrecomputeJob, parts: Parts, resources: ResourcesSection) -> None:
        from nexus_ray.modeling.loading import load_base

        set_worker_threads(resources)
        self.job = job
        self.parts = parts
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(job.tokenizer)
        self.teacher = load_base(job.teacher.model) if job.teacher and job.teacher.sources else None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Process one shard row; the small record it leaves beside the file says that the file is complete."""
        shard = Shard(**row)
        unreadable = UnreadableRows(self.job.data.strict)
        columns = self._columns(shard, unreadable)
        path = self.parts.path(shard).with_suffix(".parquet")
        write_rows(path, columns)
        record = TargetFile(
            name=path.name,
            source=shard.source,
            sequences=len(columns["num_tokens"]),
            tokens=int(sum(columns["num_tokens"])),
            bytes=path.stat().st_size,
            sha256=sha256_file(path),
        )
        write_json(self.parts.path(shard), {"file": record.model_dump(), **unreadable.as_row()})
        return {"shard": shard.index, "tokens": record.tokens}

    def _columns(self, shard: Shard, unreadable: UnreadableRows) -> dict[str, list[Any]]:
        plan = self.job.teacher
        size = plan.targets.batch_sequences if plan else 64
        columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        packed = pack_shard(shard, self.tokenizer, self.job.data.sequence_length, unreadable.handler)
        for batch in batches(packed, size):
            for name, values in self._batch_columns(batch, shard.source).items():
                columns[name] += list(values)
        return columns

    def _batch_columns(self, batch: Batch, source: str) -> dict[str, Any]:
        rows = len(batch.num_tokens)
        columns: dict[str, Any] = dict.fromkeys(_COLUMNS, [[]] * rows)
        columns |= {"source": [source] * rows, "input_ids": batch.input_ids, "num_tokens": batch.num_tokens}
        plan = self.job.teacher
        if self.teacher is None or plan is None or source not in plan.sources:
            return columns
        logits, router_logits = self.teacher.forward_batch(batch)
        if source in plan.output_sources:
            top = compress(logits, plan.targets.top_k)
            columns["top_ids"] = top.ids.int().flatten(1).cpu().numpy()
            columns["top_log_probs"] = top.log_probs.flatten(1).cpu().numpy()
            columns["tail_log_prob"] = top.tail_log_prob.cpu().numpy()
        if source in plan.router_sources:
            columns["router_logits"] = router_logits.half().flatten(1).cpu().numpy()
        return columns


_COLUMNS = ("source", "input_ids", "num_tokens", "top_ids", "top_log_probs", "tail_log_prob", "router_logits")


def _report_unreadable(job: PrecomputeJob, shards: list[Shard], records: list[dict[str, Any]]) -> None:
    """Warn of rows that were left out, those of an interrupted call among them."""
    unreadable = UnreadableRows(job.data.strict)
    for shard, record in zip(shards, records, strict=True):
        unreadable.add_row(shard.source, {"shard": shard.index, **record})
    read = {shard.source for shard, record in zip(shards, records, strict=True) if record["file"]["tokens"]}
    unreadable.warn("train", without_text=set(job.names) - read)


def _manifest(job: PrecomputeJob, records: list[dict[str, Any]]) -> Manifest:
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    plan = job.teacher
    return Manifest(
        base_fingerprint=job.base_fingerprint,
        tokenizer_sha256=tokenizer_digest(tokenizer),
        vocabulary=len(tokenizer),
        sequence_length=job.data.sequence_length,
        top_k=plan.targets.top_k if plan and plan.output_sources else 0,
        teacher_sources=tuple(sorted(plan.sources)) if plan else (),
        files=tuple(TargetFile.model_validate(record) for record in records),
    )


def _check_enough_text(manifest: Manifest, job: PrecomputeJob) -> None:
    for name in job.names:
        tokens = sum(file.tokens for file in manifest.files if file.source == name)
        if tokens < job.data.sequence_length:
            raise DataError(
                f"data.sources.{name}.train holds {tokens} tokens, less than one sequence ({job.data.sequence_length})",
                "add text or lower data.sequence_length",
            )
