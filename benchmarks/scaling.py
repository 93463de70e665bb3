"""Claim: two training workers with one thread each are at least 1.7 times as fast as one.

Trains the demo with `nexus-ray train`, as a user does: Ray Train workers, the embedded model, real text, stored
targets, the same global batch for any number of workers. Targets are made once; each training starts from a copy of
that run directory. Trainings with one and with two workers take turns. Seconds of each optimiser step are read from
`metrics.jsonl`; the first steps, in which caches fill, are left out, and so are start-up, validation and checkpoints.
A figure is the global batch's tokens over the median seconds of a training's steps; `two_worker_speedup` is the
median of the rounds' ratios. How much two cores of this machine can do at all is measured in the same rounds: two
trainings with one worker each that know nothing of each other, at the same time, against one of them alone
(`machine_speedup`); cores that share caches, memory and clock give less than 2. It needs idle cores: with fewer than
two the script refuses to start. The last line is one JSON object.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --rounds 1 --steps 8 --warmup 3
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _common import command_line, print_result

from nexus_ray.config import load_config
from nexus_ray.errors import NexusError
from nexus_ray.layout import RunLayout
from nexus_ray.training.watching.metrics import read_metrics

_ROOT = Path(__file__).parents[1]
_WORKERS = (1, 2)
_QUICK_START = "collect.tokens=16384"  # where the shared experts begin does not change how long a step takes


def nexus_ray(*arguments: str) -> None:
    """Run a command; its log goes to the standard error output.

    Raises:
        NexusError: it failed.
    """
    command = [sys.executable, "-m", "nexus_ray", *arguments, "--quiet"]
    if subprocess.run(command, stdout=sys.stderr, cwd=_ROOT).returncode != 0:
        raise NexusError(f"`nexus-ray {' '.join(arguments)}` failed", "its message is above")


def train(arguments: argparse.Namespace, prepared: Path, directory: Path, workers: int) -> dict[str, Any]:
    """Tokens/s of one training in a copy of the prepared run."""
    shutil.copytree(prepared, directory)
    steps = arguments.steps
    nexus_ray(
        "train",
        str(arguments.config),
        _QUICK_START,
        f"run.directory={directory}",
        f"resources.workers={workers}",
        "resources.cpus_per_worker=1",
        f"train.steps={steps}",
        f"train.validate_every={steps}",
        f"train.checkpoint_every={steps}",
    )
    records = [record for record in read_metrics(RunLayout(directory).metrics) if record["event"] == "step"]
    shutil.rmtree(directory)
    seconds = [record["seconds"] for record in records[arguments.warmup :]]
    return {
        "tokens_per_second": tokens_per_step(arguments.config) / statistics.median(seconds),
        "step_seconds": [round(value, 4) for value in seconds],
        "first_losses": [record["loss"] for record in records[:3]],
    }


def trainings_apart(arguments: argparse.Namespace, prepared: Path, directory: Path) -> float:
    """Tokens/s of two trainings together that run at the same time, with one worker each."""

    def one(index: int) -> float:
        speed: float = train(arguments, prepared, directory.with_name(f"{directory.name}-{index}"), 1)[
            "tokens_per_second"
        ]
        return speed

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(one, range(2)))


def tokens_per_step(config: Path) -> int:
    """Tokens of a global batch."""
    settings = load_config(config)
    return sum(settings.sequences_per_step().values()) * settings.data.sequence_length


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trainings in turns, and how many times faster two workers are."""
    cores = len(os.sched_getaffinity(0))
    if cores < max(_WORKERS):
        raise NexusError(f"two workers need two cores, this machine has {cores}")
    if arguments.warmup >= arguments.steps:
        raise NexusError(f"--warmup {arguments.warmup} leaves nothing of --steps {arguments.steps}")
    rounds = []
    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared"
        nexus_ray("run", str(arguments.config), "--until", "precompute", _QUICK_START, f"run.directory={prepared}")
        for index in range(arguments.rounds):
            found: dict[str, Any] = {
                str(workers): train(arguments, prepared, Path(scratch) / f"{index}-{workers}", workers)
                for workers in _WORKERS
            }
            one, two = (found[str(workers)]["tokens_per_second"] for workers in _WORKERS)
            apart = trainings_apart(arguments, prepared, Path(scratch) / f"{index}-apart")
            rounds.append(found | {"apart": apart, "speedup": two / one, "machine_speedup": apart / one})
            print(f"round {index}, tokens/s: {one:,.0f}, two workers {two:,.0f}, two apart {apart:,.0f}", flush=True)
    return {
        "benchmark": "scaling",
        "two_worker_speedup": statistics.median(found["speedup"] for found in rounds),
        "machine_speedup": statistics.median(found["machine_speedup"] for found in rounds),
        "share_of_machine": statistics.median(found["speedup"] / found["machine_speedup"] for found in rounds),
        "cores": cores,
        "tokens_per_step": tokens_per_step(arguments.config),
        "steps": arguments.steps - arguments.warmup,
        "rounds": rounds,
    }


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=_ROOT / "configs" / "demo.yaml")
    parser.add_argument("--rounds", type=int, default=3, help="trainings with each number of workers")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of a training")
    parser.add_argument("--warmup", type=int, default=8, help="steps at the start that are not counted")
    arguments = parser.parse_args()
    with command_line():
        print_result(run(arguments))


if __name__ == "__main__":
    main()
