"""The worker of an evaluation: base and student on the same batches of held-out text, in one pass over it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_ray.cluster import set_worker_threads
from nexus_ray.config import Config
from nexus_ray.data.sources import Shard
from nexus_ray.data.unreadable import UnreadableRows
from nexus_ray.evaluation.continuations import continue_both, own_prompts, source_prompts
from nexus_ray.evaluation.packed_text import PackedText
from nexus_ray.evaluation.perplexity import PairedLosses
from nexus_ray.evaluation.rolling_text import RollingText
from nexus_ray.evaluation.routers import PairedRouters
from nexus_ray.evaluation.scored_pass import score_batch
from nexus_ray.evaluation.scored_text import IGNORED, Part, ScoringBatch, Wordless, encode_documents
from nexus_ray.modeling.loading import LoadedModel
from nexus_ray.storage import Place


class PairedScorer:
    """Actor that loads the student once and scores held-out shards with it and with its base.

    Args:
        config: the run.
        overlay: directory of the student's overlay.
    """

    def __init__(self, config: Config, overlay: Place) -> None:
        from nexus_ray.modeling.loading import load_student

        set_worker_threads(config.resources)
        self.config = config
        self.student = load_student(config.model, overlay)
        self._layout = _layout(config, self.student)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Score one row of `plan_scoring`; returns plain lists, one entry a unit or a layer, and moments as bytes."""
        row = dict(row)
        limit, first_half, samples, prompts = (row.pop(name) for name in ("limit", "first_half", "samples", "prompts"))
        shard, unreadable, wordless = Shard(**row), UnreadableRows(self.config.data.strict), Wordless()
        part = Part(shard, limit, float(first_half), self.config.data.sources[shard.source].predict)
        documents = encode_documents(self.student.tokenizer, part, unreadable.handler)
        sums = _Sums(PairedRouters.zero(self.student.dimensions))
        for batch in self._layout(documents, part, wordless):
            self._score(batch, sums)
        continued = self._continuations(shard, int(samples), own=bool(prompts))
        extra = {"wordless": wordless.count, "samples": json.dumps(continued)}
        return _as_row(shard.index, sums.losses(), sums.routers) | extra | unreadable.as_row()

    def _score(self, batch: ScoringBatch, sums: _Sums) -> None:
        with self.student.base():
            base_nats, base_routers = score_batch(self.student, batch)
        student_nats, student_routers = score_batch(self.student, batch)
        top_k = self.student.dimensions.experts_per_token
        sums.add(
            batch,
            PairedLosses(base_nats, student_nats, (batch.labels != IGNORED).sum(axis=1), batch.num_bytes, batch.words),
            PairedRouters.of(base_routers, student_routers, batch.observed, batch.halves, top_k, batch.names),
        )

    def _continuations(self, shard: Shard, count: int, *, own: bool) -> list[dict[str, Any]]:
        section = self.config.evaluate.samples
        prompts = own_prompts(self.student, section.prompts) if own else []
        prompts += source_prompts(self.student, shard, count, section)
        return [continue_both(self.student, prompt, section.tokens) for prompt in prompts]


def _layout(config: Config, student: LoadedModel) -> PackedText | RollingText:
    section, length = config.evaluate, config.data.sequence_length
    if section.windows == "rolling":
        return RollingText(student.tokenizer, length, section.stride, section.batch_sequences)
    return PackedText(student.tokenizer, length, section.batch_sequences)


@dataclass
class _Sums:
    """What is known of a shard so far: losses by row, with the units that the rows belong to."""

    routers: PairedRouters
    _units: list[NDArray[np.int64]] = field(default_factory=list)
    _rows: list[PairedLosses] = field(default_factory=list)

    def add(self, batch: ScoringBatch, losses: PairedLosses, routers: PairedRouters) -> None:
        self._units.append(batch.units)
        self._rows.append(losses)
        self.routers = self.routers + routers

    def losses(self) -> PairedLosses:
        """By unit, in their order."""
        units = np.concatenate([np.zeros(0, np.int64), *self._units])
        return PairedLosses.concatenate(self._rows).summed(units)


def _as_row(shard: int, losses: PairedLosses, routers: PairedRouters) -> dict[str, Any]:
    """One shard's sums as a Ray Data row of plain lists and bytes."""
    drift = routers.drift
    return {
        "shard": shard,
        "base_nats": losses.base_nats.tolist(),
        "student_nats": losses.student_nats.tolist(),
        "targets": losses.targets.tolist(),
        "num_bytes": losses.num_bytes.tolist(),
        "words": losses.words.tolist(),
        "drift_tokens": drift.tokens,
        "kl": drift.kl.tolist(),
        "l1": drift.l1.tolist(),
        "top_k_overlap": drift.top_k_overlap.tolist(),
        "base_moments": routers.base.to_bytes(),
        "student_moments": routers.student.to_bytes(),
    }
