"""Base against student on held-out text, on Ray: one pass over the text, both models on the same batches.

Shards are scored in parallel and merged in shard order, so the numbers do not depend on how many workers there are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nexus_ray.cluster import map_over_pool
from nexus_ray.config import Config
from nexus_ray.data.sources import Shard
from nexus_ray.data.unreadable import UnreadableRows
from nexus_ray.errors import ArtefactError
from nexus_ray.evaluation.expert_load import compare_loads
from nexus_ray.evaluation.lm_eval_tasks import check_tasks, run_tasks
from nexus_ray.evaluation.routers import MomentsPair
from nexus_ray.evaluation.scorer import PairedScorer
from nexus_ray.evaluation.summary import source_result
from nexus_ray.evaluation.work import plan_scoring
from nexus_ray.layout import RunLayout
from nexus_ray.router.comparison import as_rows
from nexus_ray.storage import exists


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found, as it stands in `report.json`.

    Attributes:
        sources: {source: {role, unreadable_rows, documents_without_words, unit, units, tokens, words, bytes, base,
            student, ratio, nats_difference, router_drift, router_load, router_change}}. `base` and `student` hold
            token_perplexity, confidence_interval, word_perplexity, byte_perplexity, bits_per_byte and nats_per_token;
            every confidence_interval is [low, high]. `router_change` holds the figures of `router/comparison.py`,
            `router_load` those of `evaluation/expert_load.py`. `docs/evaluation.md` says what each number means.
        samples: [{source, prompt, base, student}], greedy continuations.
        tasks: what `run_tasks` of `evaluation/lm_eval_tasks.py` returns; None without tasks.
    """

    sources: dict[str, dict[str, Any]]
    samples: list[dict[str, Any]] = field(default_factory=list)
    tasks: dict[str, Any] | None = None


def evaluate(config: Config, layout: RunLayout) -> Evaluation:
    """Score base and student on the held-out text of every source that has some, and run the configured tasks.

    Args:
        config: the run.
        layout: its paths; the trained overlay must exist.

    Raises:
        ConfigError: no source has held-out text, or a task cannot be run.
        DataError: a source's held-out text is shorter than two units, or the data of a task cannot be had.
        ArtefactError: there is no trained overlay, or it gives NaN or infinite losses or router logits.
    """
    if not exists(layout.overlay):
        raise ArtefactError(f"no trained overlay at {layout.overlay}", "run `nexus-ray train CONFIG`")
    check_tasks(config.evaluate.lm_eval)
    shards, items = plan_scoring(config)
    tasks = run_tasks(config, layout)  # first: data that cannot be had is found before hours of scoring, not after
    worker = {"config": config, "overlay": layout.overlay}
    scored = merge(shards, map_over_pool(PairedScorer, worker, items, config.resources, "evaluate"), config)
    return replace(scored, tasks=tasks)


def merge(shards: Sequence[Shard], rows: Iterable[dict[str, Any]], config: Config) -> Evaluation:
    """Results by source; within a source the shards are joined in their own order, not in order of arrival."""
    order: dict[str, list[int]] = {}
    for shard in shards:
        order.setdefault(shard.source, []).append(shard.index)
    source_of = {shard.index: shard.source for shard in shards}
    moments = {source: MomentsPair(numbers) for source, numbers in order.items()}
    arrived = {}
    for row in rows:
        index = int(row["shard"])
        moments[source_of[index]].add(index, row.pop("base_moments"), row.pop("student_moments"))
        arrived[index] = row
    by_source = {source: [arrived[index] for index in numbers] for source, numbers in order.items()}
    unreadable = _report_unreadable(by_source, config)
    sources = {
        source: source_result(source, results, unreadable.total(source), config) | _routers(moments[source])
        for source, results in by_source.items()
    }
    return Evaluation(
        sources, [sample for index in sorted(arrived) for sample in json.loads(arrived[index]["samples"])]
    )


def _routers(moments: MomentsPair) -> dict[str, Any]:
    """What the moments of both models' routers say, by layer."""
    return {"router_load": compare_loads(*moments.selected()), "router_change": as_rows(moments.compare())}


def _report_unreadable(by_source: dict[str, list[dict[str, Any]]], config: Config) -> UnreadableRows:
    unreadable = UnreadableRows(config.data.strict)
    for source, rows in by_source.items():
        for row in rows:
            unreadable.add_row(source, row)
    empty = [source for source, rows in by_source.items() if not any(len(row["targets"]) for row in rows)]
    unreadable.warn("heldout", without_text=empty)
    return unreadable
