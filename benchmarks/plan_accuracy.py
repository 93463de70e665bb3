"""Claim: `nexus-ray plan` is within 15 % of the anonymous memory that a training worker really takes at its peak.

Runs optimiser steps of one worker in a plain process and compares its peak with the plan of the same configuration:
the demo's on the embedded model, or one short sequence on a checkpoint of GPT-OSS 20B shape. The process imports what
a worker does; Ray, DDP, validation and files of targets have no part in it, so the plan is asked for one
worker without text, and its 360 MiB for a Ray actor stand against the 287 MiB of imports here. The last line is one
JSON object.

    python benchmarks/plan_accuracy.py --shape tiny
    python benchmarks/plan_accuracy.py --shape gpt-oss-20b
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from _common import MemoryPeak, command_line, print_result
from _worker_step import CHECKPOINTS, WorkerSteps, make_overlay, true_shape_config

from nexus_ray.config import Config, load_config
from nexus_ray.planning.sizes import read_sizes
from nexus_ray.planning.training import training_needs
from nexus_ray.planning.worker import Worker
from nexus_ray.training.checkpointing import Snapshot, take_snapshot

_ROOT = Path(__file__).parents[1]
_TINY = "tiny"


def tiny_config(overrides: list[str]) -> Config:
    """The demo, one worker, which then holds no buffers of DDP."""
    path = _ROOT / "assets" / "tiny-gpt-oss"
    return load_config(_ROOT / "configs" / "demo.yaml", [f"model.path={path}", "resources.workers=1", *overrides])


def import_worker_modules() -> None:
    """What a training worker has imported before it loads a model."""

    import nexus_ray.training.distil  # noqa: F401


def measure(config: Config, steps: int) -> MemoryPeak:
    """Peaks of this process over loading and some steps."""
    with tempfile.TemporaryDirectory() as scratch, MemoryPeak(interval=0.002) as peak:
        make_overlay(config, Path(scratch) / "overlay")
        worker = WorkerSteps(config, Path(scratch) / "overlay")
        written: list[Snapshot] = []  # the copy that is held while a checkpoint is written and training goes on
        for index in range(steps):
            print(f"step {index}: loss {worker.step()[0]:.3f} nats, {peak.anonymous / 2**20:,.0f} MiB", flush=True)
            written.clear()
            written.append(take_snapshot(worker.parameters, {"step": index}, worker.optimiser))
    return peak


def compare(config: Config, steps: int) -> dict[str, Any]:
    """Planned against measured."""
    worst = training_needs(Worker.of(config, read_sizes(config.model.path))).peak
    import_worker_modules()
    peak = measure(config, steps)
    for part in worst.parts:
        print(f"{part.name:<34} {part.size / 2**20:>10,.1f} MiB")
    ratio = worst.total / peak.anonymous
    return {
        "within_15_percent": 0.85 <= ratio <= 1.15,
        "planned_bytes": worst.total,
        "planned_phase": worst.name,
        "measured_bytes": peak.anonymous,
        "ratio": round(ratio, 3),
        "imports_bytes": peak.start_anonymous,
        "parts": {part.name: part.size for part in worst.parts},
    }


def main() -> None:
    """Parse the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", choices=[_TINY, "gpt-oss-20b"], default=_TINY)
    parser.add_argument("--layers", type=int, help="fewer layers than the true shape, for a quick look")
    steps = "optimiser steps (default 2: the second has moments and a checkpoint)"
    parser.add_argument("--steps", type=int, default=2, help=steps)
    parser.add_argument("--directory", type=Path, default=CHECKPOINTS, help="of checkpoints")
    parser.add_argument("overrides", nargs="*", help="of the configuration, e.g. model.experts=grouped_mm")
    arguments = parser.parse_args()
    with command_line():
        if arguments.shape == _TINY:
            config = tiny_config(arguments.overrides)
        else:
            config = true_shape_config(arguments.directory, arguments.shape, arguments.layers, arguments.overrides)
        print_result(compare(config, arguments.steps) | {"shape": arguments.shape, "steps": arguments.steps})


if __name__ == "__main__":
    main()
