"""Claim: distilling online takes at most 15 % more memory than from stored targets, since the base is there once.

A training worker takes optimiser steps with the demo's kind of losses (cross-entropy on one source, four times the
divergence from the base on another), once with stored top-K targets and once with an online teacher: the same model
with its shared experts off, whose pass keeps final hidden states and nothing else. Each is a process of its own on a
base of GPT-OSS 20B's true shape (few layers), with random tokens, and with the run's own objective and optimiser.

`peak_ratio` compares the largest resident memory during the steps: anonymous memory plus the touched pages of the
mapped base. `peak_ratio_anonymous` leaves the mapped base out, so it is the stricter one, and `peak_ratio_above_start`
also what the worker held before the steps: float32 master weights. A second copy of the base for the teacher would
add `base_bytes`. The last line is one JSON object.

    python benchmarks/online_memory.py
    python benchmarks/online_memory.py --layers 4 --checkpointing
    python benchmarks/online_memory.py --model assets/tiny-gpt-oss --sequences 8
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import MemoryPeak, command_line, print_result
from _worker_step import CHECKPOINTS, WorkerSteps, make_checkpoint, make_overlay, step_config

MODES = ("offline", "online")
_SHAPE = "gpt-oss-20b"
_RATIOS = {"peak_ratio": "resident", "peak_ratio_anonymous": "anonymous", "peak_ratio_above_start": "above_start"}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peaks of a worker's steps in one mode, in bytes."""
    half = max(1, arguments.sequences // 2)
    config = step_config(
        arguments.model,
        [
            f"train.mode={arguments.mode}",
            f"data.sequence_length={arguments.length}",
            f"train.micro_batch_sequences={2 * half}",
            f"train.gradient_checkpointing={str(arguments.checkpointing).lower()}",
            f"train.sources={{domain: {{sequences_per_step: {half}, cross_entropy: 1.0}}, "
            f"general: {{sequences_per_step: {half}, output_kl: 4.0}}}}",
        ],
    )
    with tempfile.TemporaryDirectory() as scratch:
        make_overlay(config, Path(scratch) / "overlay")
        worker = WorkerSteps(config, Path(scratch) / "overlay")
    with MemoryPeak() as peak:
        losses = [worker.step()[0] for _ in range(arguments.steps)]
    return {
        "resident": peak.resident,
        "anonymous": peak.anonymous,
        "above_start": peak.transient,
        "base_bytes": sum(p.nbytes for p in worker.student.model.parameters()),
        "losses": losses,
    }


def in_own_process(arguments: argparse.Namespace, mode: str) -> dict[str, Any]:
    """`measure` in a new process."""
    command = [sys.executable, __file__, "--mode", mode, "--model", str(arguments.model)]
    command += [f"--{name}={getattr(arguments, name)}" for name in ("sequences", "length", "steps")]
    command += ["--checkpointing"] if arguments.checkpointing else []
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    shown = ", ".join(f"{name} {found[name] / 2**20:,.0f} MiB" for name in _RATIOS.values())
    print(f"{mode:<8} {shown}", flush=True)
    return found


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both modes, and the second's peaks relative to the first's."""
    if arguments.model is None:
        arguments.model = arguments.directory / f"{_SHAPE}-{arguments.layers}-layers"
        make_checkpoint(_SHAPE, arguments.layers, arguments.model)
    found = {mode: in_own_process(arguments, mode) for mode in MODES}
    ratios = {name: found["online"][field] / found["offline"][field] for name, field in _RATIOS.items()}
    settings = {name: getattr(arguments, name) for name in ("sequences", "length", "steps", "checkpointing")}
    return {"benchmark": "online_memory", **ratios, "model": arguments.model.name, **settings, "bytes": found}


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="of GPT-OSS 20B's true shape")
    parser.add_argument("--model", type=Path, help="another base")
    parser.add_argument("--sequences", type=int, default=4, help="of a step, half of them of each source")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in both modes")
    parser.add_argument("--directory", type=Path, default=CHECKPOINTS, help="of checkpoints")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with command_line():
        print_result(measure(arguments) if arguments.mode else run(arguments))


if __name__ == "__main__":
    main()
