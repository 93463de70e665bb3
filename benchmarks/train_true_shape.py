"""Claim: a 24 GiB machine without a GPU takes a whole training step on a model of GPT-OSS 20B's true shape.

Makes (or reuses) a checkpoint of that shape with random weights and an overlay of full width that starts at zero,
loads both as training does, and takes optimiser steps with the project's own objective, clipping and AdamW: float32
master weights, gradients and moments for every shared expert. The base is memory-mapped, so its pages are the
kernel's to drop; `peak_anonymous_bytes` is what the process itself holds. The last line is one JSON object.

    python benchmarks/train_true_shape.py --shape gpt-oss-20b --sequence-length 256 --steps 1
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from _common import MemoryPeak, command_line, print_result
from _stopwatch import StepTimes
from _true_shape import SHAPES
from _worker_step import CHECKPOINTS, WorkerSteps, make_overlay, true_shape_config

from nexus_ray.config import Config
from nexus_ray.modeling.loading import LoadedModel


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--directory", type=Path, default=CHECKPOINTS, help="of checkpoints")
    arguments = parser.parse_args()
    length = f"data.sequence_length={arguments.sequence_length}"
    config = true_shape_config(arguments.directory, arguments.shape, arguments.layers, [length])
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        make_overlay(config, Path(scratch) / "overlay")
        result = measure(config, Path(scratch) / "overlay", arguments.steps)
    print_result(result | {"shape": arguments.shape, "layers": arguments.layers or SHAPES[arguments.shape].layers})


def measure(config: Config, overlay: Path, steps: int) -> dict[str, Any]:
    """Load, train, and say what it took."""
    # The first layer's shared expert gets no gradient for its input: its time ends with its weights' gradients.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    with MemoryPeak(interval=0.01) as peak:
        started = time.perf_counter()
        worker = WorkerSteps(config, overlay)
        loaded = time.perf_counter() - started
        times = StepTimes(worker.student)
        records = []
        for index in range(steps):
            started = time.perf_counter()
            loss, norm = worker.step(times)
            seconds = time.perf_counter() - started
            records.append({"loss": loss, "gradient_norm": norm, "seconds": seconds})
            print(f"step {index}: loss {loss:.3f} nats, gradient norm {norm:.3g}, {seconds:.1f} s", flush=True)
    return {
        "benchmark": "train_true_shape",
        "sequence_length": config.data.sequence_length,
        "threads": torch.get_num_threads(),
        "trained_parameters": sum(p.numel() for p in worker.parameters.values()),
        "load_seconds": round(loaded, 1),
        "seconds_per_step": times.parts(steps),
        "peak_anonymous_bytes": peak.anonymous,
        "peak_resident_bytes": peak.resident,
        "dequantised_weight_bytes": dequantised_bytes(worker.student),
        "packed_weight_bytes": sum(p.nbytes for p in worker.student.model.parameters()),
        "steps": records,
    }


def dequantised_bytes(student: LoadedModel) -> int:
    """What the base's weights would take with its experts in bfloat16; all of it anonymous."""
    packed = sum(p.nbytes for name, p in student.model.named_parameters() if name.endswith(("_blocks", "_scales")))
    values = sum(2 * p.numel() for name, p in student.model.named_parameters() if name.endswith("_blocks"))
    return sum(p.nbytes for p in student.model.parameters()) - packed + 2 * values


if __name__ == "__main__":
    with command_line():
        main()
