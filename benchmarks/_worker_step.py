"""A training worker's steps in a plain process: what `DistilTask` does with a run's micro-batches, without Ray and
without reading ahead; router targets are all logits of all layers.

Token ids and stored teacher targets are random; the model, the shared experts' shape, the losses and their weights,
the order of micro-batches, clipping and AdamW are the run's. The base is one that exists, or a checkpoint of true
shape that is made when it is missing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from _stopwatch import StepTimes
from torch import Tensor, nn

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import OverlayWriter
from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.cluster import set_worker_threads
from nexus_ray.config import Config, load_config
from nexus_ray.conversion.initialise import layer_tensors
from nexus_ray.conversion.plan import describe_overlay
from nexus_ray.conversion.width import random_expert
from nexus_ray.families import family_of
from nexus_ray.modeling.loading import LoadedModel, load_student
from nexus_ray.modeling.trained import trained_parameters
from nexus_ray.planning.losses import micro_batches
from nexus_ray.targets.reading.reader import TargetBatch
from nexus_ray.targets.teacher import HiddenTargets, OutputTargets, RouterTargets, SampledTargets, TopKTargets
from nexus_ray.training.losses.objective import MicroBatch, Output, loss_of, objective_at, shares, term_counts
from nexus_ray.training.optimiser import build_optimiser

_ROOT = Path(__file__).parents[1]
CHECKPOINTS = _ROOT / "build" / "true-shape"
Measure = Callable[[str], AbstractContextManager[None]]


class WorkerSteps:
    """The trained state of one worker, and its optimiser steps.

    Args:
        config: the run; the worker takes its share of each global batch.
        overlay: directory of the overlay to start from.
        device: where the model is.
    """

    def __init__(self, config: Config, overlay: Path, device: str = "cpu") -> None:
        set_worker_threads(config.resources)
        self.config = config
        self.student: LoadedModel = load_student(config.model, overlay, [torch.device(device)])
        if config.train.gradient_checkpointing:
            self.student.checkpoint_layers()
        self.student.train_routers(config.train.routers.train)
        self.parameters: dict[str, nn.Parameter] = trained_parameters(self.student, config.train.routers.train)
        self.optimiser = build_optimiser(self.parameters, config.train.optimiser, config.train.routers)
        self._objective = objective_at(config.train, 1.0)
        self._generator = torch.Generator(device).manual_seed(config.run.seed)

    def step(self, times: StepTimes | None = None) -> tuple[float, float]:
        """One optimiser step, timed by part; returns its loss (nats a token) and its gradient norm before clipping."""
        measure = times.measure if times else lambda _: nullcontext()
        total = 0.0
        for batch in micro_batches(self.config):
            loss = torch.zeros(())
            for part, output in self._outputs(batch, measure):
                with measure("loss"):
                    loss = loss + self._loss(part, output)
            with measure("backward"):
                loss.backward()
            total += loss.item()
        with measure("optimizer"):
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.train.optimiser.clip_norm)
            self.optimiser.step()
            self.optimiser.zero_grad()
        return total, float(norm)

    def _loss(self, part: MicroBatch, output: Output) -> Tensor:
        weights = shares(self._objective.weights[part.source], self._counts())
        return loss_of(part, output, self._objective, weights)[0]

    def _counts(self) -> dict[str, int]:
        length, sequences = self.config.data.sequence_length, self.config.sequences_per_step()
        targets = {name: count * (length - 1) for name, count in sequences.items()}
        tokens = {name: count * length for name, count in sequences.items()}
        return term_counts(self._objective.weights, targets, tokens, tokens)

    def _outputs(self, batch: dict[str, int], measure: Measure) -> Iterator[tuple[MicroBatch, Output]]:
        with self.student.device:
            parts = [self._micro_batch(name, sequences) for name, sequences in batch.items()]
        ids, valid = (torch.cat([getattr(part.batch, name) for part in parts]) for name in ("input_ids", "valid"))
        with measure("forward"):
            hidden, router_logits = self.student.hidden_states(ids, valid)
        sizes = list(batch.values())
        for part, of_part, routers in zip(parts, hidden.split(sizes), router_logits.split(sizes), strict=True):
            yield part, Output(of_part, routers, self.student.head, self.student.dimensions.experts_per_token)

    def _micro_batch(self, name: str, sequences: int) -> MicroBatch:
        shape = (sequences, self.config.data.sequence_length)
        ids = torch.randint(0, len(self.student.head), shape, generator=self._generator)
        mask = torch.ones(shape, dtype=torch.bool)
        mask[:, 0] = False
        batch = TargetBatch(ids, torch.full(shape[:1], shape[1]), mask)
        return MicroBatch(name, replace(batch, **self._teacher(name, batch)))

    @torch.no_grad()
    def _teacher(self, name: str, batch: TargetBatch) -> dict[str, OutputTargets | RouterTargets | None]:
        """Targets of each kind that the source has a loss for."""
        section = self.config.train.sources[name]
        if not (section.needs_output or section.router_kl):
            return {}
        layers = tuple(range(self.student.dimensions.layers))
        if self.config.train.mode == "online":
            with self.student.base():
                hidden, routers = self.student.hidden_states(batch.input_ids, batch.valid)
            output: OutputTargets = HiddenTargets(hidden[:, :-1].flatten(0, 1))
            routers = routers.flatten(0, 1)
        else:
            output = self._stored(int(batch.loss_mask.sum()))
            shape = (batch.input_ids.numel(), len(layers), self.student.dimensions.experts)
            routers = torch.randn(*shape, generator=self._generator)
        return {
            "output": output if section.needs_output else None,
            "router": RouterTargets(layers, 1, logits=routers) if section.router_kl else None,
        }

    def _stored(self, positions: int) -> OutputTargets:
        """Random targets of the run's mode."""
        targets = self.config.targets
        if targets.mode == "hidden":
            return HiddenTargets(torch.randn(positions, self.student.head.shape[1], generator=self._generator))
        if targets.mode == "sampled":
            ids = torch.randint(0, len(self.student.head), (positions, targets.draws), generator=self._generator)
            return SampledTargets(ids, torch.rand(positions, generator=self._generator))
        kept = torch.randn(positions, 2 * targets.top_k, generator=self._generator).topk(targets.top_k + 1)
        log_probs = kept.values.log_softmax(-1)
        return TopKTargets(kept.indices[:, :-1], log_probs[:, :-1], log_probs[:, -1])


def true_shape_config(directory: Path, shape: str, layers: int | None, overrides: list[str]) -> Config:
    """One sequence of cross-entropy a step, in bfloat16 on two cores, on a checkpoint of true shape.

    Args:
        directory: of checkpoints; one of this shape is made when it is not there.
        shape: see `_true_shape.SHAPES`.
        layers: fewer layers than the shape has.
        overrides: of the configuration.
    """
    model = directory / (shape + (f"-{layers}-layers" if layers else ""))
    make_checkpoint(shape, layers, model)
    return step_config(model, overrides)


def step_config(model: Path, overrides: list[str]) -> Config:
    """One sequence of cross-entropy a step, in bfloat16 on two cores, on the base in directory `model`."""
    settings = [
        f"model.path={model}",
        "model.dtype=bfloat16",
        "resources={workers: 1, cpus_per_worker: 2, gpus_per_worker: 0}",
        "data.sequence_length=256",
        "train.micro_batch_sequences=1",
        "train.sources={domain: {sequences_per_step: 1, cross_entropy: 1.0}}",
    ]
    return load_config(_ROOT / "configs" / "gpt-oss-20b.yaml", [*settings, *overrides])


def make_checkpoint(shape: str, layers: int | None, directory: Path) -> None:
    """Write the checkpoint unless it is there."""
    if (directory / "config.json").exists():
        return
    command = [
        sys.executable,
        str(Path(__file__).with_name("make_checkpoint.py")),
        "--shape",
        shape,
        "--output",
        str(directory),
    ]
    subprocess.run(command + (["--layers", str(layers)] if layers else []), check=True)


def make_overlay(config: Config, directory: Path) -> None:
    """The run's overlay, with zero down projections and random gate and up projections."""
    model = read_model_config(config.model.path)
    dimensions = family_of(model).dimensions(model)
    zero = config.convert.model_copy(update={"initialisation": "zero"})
    asked = config.model_copy(update={"convert": zero})
    description = describe_overlay(asked, dimensions, model["model_type"], fingerprint(config.model.path))
    generator = torch.Generator().manual_seed(0)
    with OverlayWriter(directory, description) as writer:
        for layer in range(dimensions.layers):
            weights = random_expert(description.hidden_size, description.width, generator)
            for name, tensor in layer_tensors(layer, weights, description).items():
                writer.write(name, tensor)
