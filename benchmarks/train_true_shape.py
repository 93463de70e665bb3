"""Claim: a 24 GiB machine without a GPU takes a whole training step on a model of GPT-OSS 20B's true shape.

Makes (or reuses) a checkpoint of that shape with random weights and an overlay of full width that starts at zero,
loads both as training does, and takes optimiser steps with the project's own objective, clipping and AdamW: float32
master weights, gradients and moments for every shared expert. The base is memory-mapped, so its pages are the
kernel's to drop; `peak_anonymous_bytes` is what the process itself holds. The last line is one JSON object.

    python benchmarks/train_true_shape.py --shape gpt-oss-20b --sequence-length 256 --steps 1
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import MemoryPeak, command_line, print_result
from _stopwatch import StepTimes
from _true_shape import SHAPES
from torch import Tensor, nn

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import OverlayConfig, OverlayWriter
from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.config import ModelSection, OptimiserSection, TrainSourceSection
from nexus_ray.families import family_of
from nexus_ray.modeling.loading import LoadedModel, load_student
from nexus_ray.router.initialise import layer_tensors
from nexus_ray.router.width import random_expert
from nexus_ray.training.loop import adamw
from nexus_ray.training.objective import MicroBatch, Teacher, combine, term_counts, token_sums

_HERE = Path(__file__).parent
_SOURCE = TrainSourceSection(sequences_per_step=1, cross_entropy=1.0)


@dataclass
class Step:
    """One training step on random tokens."""

    student: LoadedModel
    parameters: dict[str, nn.Parameter]
    optimiser: torch.optim.Optimizer
    section: OptimiserSection
    times: StepTimes

    def run(self, input_ids: Tensor) -> tuple[float, float]:
        """The loss (nats a token) and the gradient norm before clipping."""
        batch = MicroBatch("text", input_ids, torch.ones_like(input_ids, dtype=torch.bool), Teacher())
        counts = term_counts(
            {"text": _SOURCE}, {"text": input_ids.numel() - len(input_ids)}, {"text": input_ids.numel()}
        )
        with self.times.measure("forward"):
            logits, router_logits = self.student.forward(input_ids, batch.valid)
        with self.times.measure("loss"):
            loss = combine(token_sums(batch, logits, router_logits, _SOURCE, 1.0), _SOURCE, counts)
        del logits, router_logits
        with self.times.measure("backward"):
            loss.backward()
        with self.times.measure("optimizer"):
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.section.clip_norm)
            self.optimiser.step()
            self.optimiser.zero_grad()
        return loss.item(), float(norm)


def make_checkpoint(shape: str, layers: int | None, directory: Path) -> None:
    """Write the checkpoint unless it is there."""
    if (directory / "config.json").exists():
        return
    command = [sys.executable, str(_HERE / "make_checkpoint.py"), "--shape", shape, "--output", str(directory)]
    subprocess.run(command + (["--layers", str(layers)] if layers else []), check=True)


def make_overlay(model: Path, directory: Path) -> None:
    """An overlay of full width whose down projections are zero and whose gate and up projections are random."""
    config = read_model_config(model)
    dimensions = family_of(config).dimensions(config)
    description = OverlayConfig(
        base_fingerprint=fingerprint(model),
        model_type=config["model_type"],
        layers=dimensions.layers,
        hidden_size=dimensions.hidden_size,
        width=dimensions.intermediate_size,
        token_gate=True,
        scale=1.0,
        learn_scale=False,
        initialisation="zero",
    )
    generator = torch.Generator().manual_seed(0)
    with OverlayWriter(directory, description) as writer:
        for layer in range(dimensions.layers):
            weights = random_expert(description.hidden_size, description.width, generator)
            for name, tensor in layer_tensors(layer, weights, description).items():
                writer.write(name, tensor)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gpt-oss-20b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--directory", type=Path, default=_HERE.parent / "build" / "true-shape")
    arguments = parser.parse_args()
    name = arguments.shape + (f"-{arguments.layers}-layers" if arguments.layers else "")
    model, overlay = arguments.directory / name, arguments.directory / f"{name}-overlay"
    make_checkpoint(arguments.shape, arguments.layers, model)
    make_overlay(model, overlay)
    print_result(measure(model, overlay, arguments.sequence_length, arguments.steps) | {"shape": name})


def measure(model: Path, overlay: Path, sequence_length: int, steps: int) -> dict[str, Any]:
    """Load, train, and say what it took."""
    section = OptimiserSection()
    generator = torch.Generator().manual_seed(1)
    with MemoryPeak(interval=0.01) as peak:
        started = time.perf_counter()
        student = load_student(ModelSection(path=model, dtype="bfloat16"), overlay)
        loaded = time.perf_counter() - started
        assert student.shared_experts is not None
        parameters = {name: p for name, p in student.shared_experts.named_parameters() if not name.endswith("scale")}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        step = Step(student, parameters, adamw(parameters, section), section, StepTimes(student))
        vocabulary = student.config["vocab_size"]
        records = []
        for index in range(steps):
            started = time.perf_counter()
            loss, norm = step.run(torch.randint(0, vocabulary, (1, sequence_length), generator=generator))
            seconds = time.perf_counter() - started
            records.append({"loss": loss, "gradient_norm": norm, "seconds": seconds})
            print(f"step {index}: loss {loss:.3f} nats, gradient norm {norm:.3g}, {seconds:.1f} s", flush=True)
    return {
        "benchmark": "train_true_shape",
        "sequence_length": sequence_length,
        "threads": torch.get_num_threads(),
        "trained_parameters": sum(p.numel() for p in parameters.values()),
        "load_seconds": round(loaded, 1),
        "seconds_per_step": step.times.parts(steps),
        "peak_anonymous_bytes": peak.anonymous,
        "peak_resident_bytes": peak.resident,
        "dequantised_weight_bytes": dequantised_bytes(student),
        "packed_weight_bytes": sum(p.nbytes for p in student.model.parameters()),
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
