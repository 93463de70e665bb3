"""Claim: the time that `nexus-ray plan` expects for the base's passes is within 30 % of what one CPU worker takes.

Runs what a worker of `collect` and of `precompute` does with a batch, on random tokens: the layers, and the LM head
with the encoding of targets. Reading text and writing shards have no part in it. The probe and both passes take turns,
so that all see the machine in the same state. The last line is one JSON object.

    python benchmarks/teacher_time.py --config configs/demo.yaml
    python benchmarks/teacher_time.py --config my.yaml model.dtype=float32
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from _common import command_line, print_result

from nexus_ray.cluster import set_worker_threads
from nexus_ray.config import Config, load_config
from nexus_ray.data.packing import Batch
from nexus_ray.modeling.loading import LoadedModel, load_base
from nexus_ray.planning import probe, teacher_time
from nexus_ray.planning.base_passes import pass_times
from nexus_ray.planning.sizes import read_sizes
from nexus_ray.planning.target_sizes import source_targets
from nexus_ray.planning.text import SourceText
from nexus_ray.targets.writing.job import job_of_run
from nexus_ray.targets.writing.teaching import EncodingTeacher

_TOKENS = 1_000_000  # of each source, which the times are proportional to


def planned_microseconds(config: Config) -> dict[str, float]:
    """Of a token and one worker, by stage, from a fresh probe."""
    for cached in (probe.time_layer, teacher_time.encoding_seconds):
        cached.cache_clear()
    sizes, text = read_sizes(config.model.path), {name: SourceText(1, 1, _TOKENS) for name in config.train.sources}
    times = pass_times(config, sizes, source_targets(config, sizes, text))
    return {each.stage: each.seconds * config.resources.workers / each.tokens * 1e6 for each in times}


def random_batch(config: Config, vocabulary: int, sequences: int) -> Batch:
    """Full sequences."""
    length = config.data.sequence_length
    ids = np.random.default_rng(0).integers(0, vocabulary, (sequences, length), dtype=np.int32)
    return Batch(ids, np.full(sequences, length, np.int32))


def passes(config: Config, base: LoadedModel) -> dict[str, tuple[int, Callable[[], object]]]:
    """(tokens, work) of a batch of each stage that reads text."""
    vocabulary, job = base.config["vocab_size"], job_of_run(config)
    observed = random_batch(config, vocabulary, config.collect.batch_sequences)
    found: dict[str, tuple[int, Callable[[], object]]] = {
        "collect": (observed.input_ids.size, lambda: base.route_batch(observed))
    }
    if job.teacher is not None:
        taught, teacher = random_batch(config, vocabulary, job.batch_sequences), EncodingTeacher(base, job.header)
        wanted = {"output": job.header.output is not None, "router": job.header.router is not None}
        generator = np.random.default_rng(0)
        found["precompute"] = (taught.input_ids.size, lambda: teacher.columns(taught, generator, **wanted))
    return found


def compare(config: Config, rounds: int) -> dict[str, Any]:
    """Planned and measured microseconds a token, medians over the rounds."""
    set_worker_threads(config.resources)
    work = passes(config, load_base(config.model))
    planned: dict[str, list[float]] = {stage: [] for stage in work}
    measured: dict[str, list[float]] = {stage: [] for stage in work}
    for _, run in work.values():
        run()
    for _ in range(rounds):
        for stage, value in planned_microseconds(config).items():
            planned[stage].append(value)
        for stage, (tokens, run) in work.items():
            started = time.perf_counter()
            run()
            measured[stage].append((time.perf_counter() - started) / tokens * 1e6)
    pairs = {stage: (median(planned[stage]), median(measured[stage])) for stage in work}
    return {
        "within_30_percent": all(0.7 <= expected / taken <= 1.3 for expected, taken in pairs.values()),
        "ratio": {stage: round(expected / taken, 3) for stage, (expected, taken) in pairs.items()},
        "planned_microseconds_per_token": {stage: round(expected, 1) for stage, (expected, _) in pairs.items()},
        "measured_microseconds_per_token": {stage: round(taken, 1) for stage, (_, taken) in pairs.items()},
    }


def main() -> None:
    """Parse the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("overrides", nargs="*", help="of the configuration, e.g. model.dtype=float32")
    arguments = parser.parse_args()
    with command_line():
        print_result(compare(load_config(arguments.config, arguments.overrides), arguments.rounds))


if __name__ == "__main__":
    main()
