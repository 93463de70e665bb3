"""What collecting router statistics costs over a forward pass, and what a second worker gives.

Claim 1: `nexus-ray collect` reads text at 0.9 or more of the speed of a plain batched forward pass of the same model on
the same batches. The plain pass computes the decoder layers only, as collection does; with the LM head, which a
model's own `forward` computes, it is slower, and that ratio is printed too. The three alternate, batch by batch, in one
process with one thread.

Claim 2: two workers with one thread each are 1.7 times as fast as one. Workers are Ray actors, as in a run; the time is
from the start of the first unit to the end of the last, so that starting Ray and loading the model do not count.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _common import command_line, print_result

from nexus_ray.cluster import map_over_pool
from nexus_ray.config import Config, load_config
from nexus_ray.console import progress
from nexus_ray.data.packing import Batch
from nexus_ray.errors import ConfigError
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import LoadedModel, load_base
from nexus_ray.parts import Parts
from nexus_ray.router.calibration import Calibration, choose_calibration
from nexus_ray.router.candidates import CalibrationText
from nexus_ray.router.collect import StatisticsCollector, observe, plan_units

_WARM_UP_ROUNDS = 3  # in each of which another pass is the first


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--tokens", type=int, default=262_144, help="read by each pool of workers")
    parser.add_argument("--rounds", type=int, default=40, help="batches that the three passes alternate on")
    arguments = parser.parse_args()
    if arguments.rounds <= _WARM_UP_ROUNDS:
        raise ConfigError(
            f"--rounds {arguments.rounds}: the first {_WARM_UP_ROUNDS} only warm up", "use --rounds 10 or more"
        )
    with tempfile.TemporaryDirectory() as directory:
        overrides = [f"run.directory={directory}", f"collect.tokens={arguments.tokens}", "resources.cpus_per_worker=1"]
        config = load_config(arguments.config, overrides)
        layout = RunLayout(config.run.directory)
        calibration = choose_calibration(config, layout.calibration)
        check_text(config, calibration)
        speeds = {workers: pool_speed(config, layout, calibration, workers) for workers in (1, 2)}
        passes = alternate(config, calibration, arguments.rounds)
    print_result(
        {
            "throughput_ratio": passes["collect"] / passes["plain"],
            "throughput_ratio_with_head": passes["collect"] / passes["with_head"],
            "two_worker_speedup": speeds[2] / speeds[1],
            "tokens_per_second": passes,
            "pool_tokens_per_second": {str(workers): speed for workers, speed in speeds.items()},
            "tokens": sum(int(text.num_tokens.sum()) for text in calibration.sources.values()),
        }
    )


def check_text(config: Config, calibration: Calibration) -> None:
    """Refuse text of which there is no full batch to alternate on, or no unit of work for a second worker.

    Raises:
        ConfigError: there is too little.
    """
    size, units = config.collect.batch_sequences, len(plan_units(config, calibration))
    if units < 2 or not _pieces(calibration, size):
        most = max(map(len, calibration.sources.values()))
        raise ConfigError(
            f"--tokens {config.collect.tokens} gives {units} unit(s) of work and {most} sequences of a source, "
            f"where 2 units and {size} sequences are the least",
            "raise --tokens",
        )


def alternate(config: Config, calibration: Calibration, rounds: int) -> dict[str, float]:
    """Tokens a second of each pass over the same batches: the median over the rounds."""
    torch.set_num_threads(1)
    base = load_base(config.model)
    passes: dict[str, Callable[[CalibrationText], Any]] = {
        "plain": lambda text: forward(base, text.batch(), head=False),
        "collect": lambda text: observe(base, text, config),
        "with_head": lambda text: forward(base, text.batch(), head=True),
    }
    pieces = _pieces(calibration, config.collect.batch_sequences)
    speeds: dict[str, list[float]] = defaultdict(list)
    with progress("alternate passes", rounds) as advance:
        for number in range(rounds):
            piece = pieces[number % len(pieces)]
            names = list(passes)
            for name in names[number % 3 :] + names[: number % 3]:  # none is always first
                started = time.perf_counter()
                passes[name](piece)
                speeds[name].append(float(piece.num_tokens.sum()) / (time.perf_counter() - started))
            advance(1)
    return {name: median(values[_WARM_UP_ROUNDS:]) for name, values in speeds.items()}


@torch.no_grad()
def forward(base: LoadedModel, batch: Batch, *, head: bool) -> None:
    """One pass over a batch, nothing recorded."""
    model = base.model if head else base.model.base_model
    model(
        input_ids=torch.from_numpy(batch.input_ids).long(),
        attention_mask=torch.from_numpy(batch.valid).long(),
        use_cache=False,
    )


def pool_speed(config: Config, layout: RunLayout, calibration: Calibration, workers: int) -> float:
    """Tokens a second of a pool of workers that collect everything."""
    parts = Parts(layout.directory / f"parts-{workers}", ".safetensors")
    parts.begin("benchmark")
    units = plan_units(config, calibration)
    arguments = {"config": config, "parts": parts, "calibration": layout.calibration, "overlay": None}
    resources = config.resources.model_copy(update={"workers": workers})
    items = [asdict(unit) for unit in units]
    rows = list(map_over_pool(StatisticsCollector, arguments, items, resources, f"{workers} worker(s)"))
    seconds = max(row["ended"] for row in rows) - min(row["started"] for row in rows)
    return float(sum(row["tokens"] for row in rows) / seconds)


def _pieces(calibration: Calibration, size: int) -> list[CalibrationText]:
    texts = calibration.sources.values()
    return [text.take(slice(at, at + size)) for text in texts for at in range(0, len(text) - size + 1, size)]


if __name__ == "__main__":
    with command_line():
        main()
