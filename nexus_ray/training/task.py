"""What one worker trains: a frozen base with shared experts, and routers where they are trained too.

The teacher is stored (offline), or the same model with all that is trained switched off (online): the base is in
memory once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nexus_ray.checkpoints.overlay import load_overlay
from nexus_ray.cluster import set_worker_threads
from nexus_ray.config import Config
from nexus_ray.data.vocabulary import tokenizer_digest
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import LoadedModel, load_student
from nexus_ray.modeling.trained import trained_parameters
from nexus_ray.targets.reading.reader import TargetBatch, TargetSet
from nexus_ray.targets.teacher import HiddenTargets, RouterTargets
from nexus_ray.training import trainer
from nexus_ray.training.feeding.feed import Feed
from nexus_ray.training.losses.chunked import CROSS_ENTROPY
from nexus_ray.training.losses.objective import (
    TERMS,
    MicroBatch,
    Objective,
    Output,
    loss_of,
    objective_at,
    shares,
    steady_terms,
)
from nexus_ray.training.optimiser import build_optimiser
from nexus_ray.training.watching.samples import continue_text
from nexus_ray.training.watching.sums import StepSums

_NEXT_TOKEN = {CROSS_ENTROPY: 0.0}  # measured, without a part in the loss


class DistilTask:
    """Distillation on one worker."""

    def __init__(self, config: Config, layout: RunLayout) -> None:
        set_worker_threads(config.resources)
        torch.manual_seed(config.run.seed)
        self.config, self.train, self.layout = config, config.train, layout
        self.student = _student(config, layout)
        self.module = _Forward(self.student)
        self.parameters = trained_parameters(self.student, self.train.routers.train)
        self.optimiser = build_optimiser(self.parameters, self.train.optimiser, self.train.routers)
        self.parallel = trainer.data_parallel(self.module)
        targets = TargetSet.open(layout.targets, self.student.fingerprint, tokenizer_digest(self.student.tokenizer))
        self.feed = Feed(targets, config, *trainer.world())
        self._base_losses: dict[str, float] = {}

    def accumulate(self, step: int) -> dict[str, Any]:
        """Backward passes of one global batch; records the loss, its terms (nats a token) and the routers."""
        batch = self.feed.training(step)
        counts = self.feed.counts(batch)
        objective = objective_at(self.train, step / self.train.steps)
        sums = self._sums()
        for parts, is_last in self.feed.step(step):
            with trainer.synchronise_if(self.parallel, is_last):
                self._backward(parts, objective, counts, sums)
        record = sums.record()
        steady = [record["sources"][name][term] for name in batch for term in steady_terms(self.train, name)]
        return {
            **record,
            "watched": sum(steady) if steady else None,
            "tokens": sum(self.feed.num_targets(batch).values()),
            "output_temperature": objective.output_temperature,
            "router_temperature": objective.router_temperature,
            "weights": objective.weights,
        }

    def _backward(self, parts: list[MicroBatch], objective: Objective, counts: dict[str, int], sums: StepSums) -> None:
        """One micro-batch, of which nothing is left but gradients and what is added to `sums`."""
        loss = torch.zeros((), dtype=torch.float64, device=self.student.device)
        for part, output in self._outputs(parts, self.parallel):
            weights = shares(objective.weights[part.source], counts)
            value, terms = loss_of(part, output, objective, weights)
            loss = loss + value
            sums.add(part, output, terms, weights)
        # DDP averages gradients over workers: the global mean needs the factor back.
        (loss * trainer.world()[1]).backward()

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """The objective on the validation sequences, as it is at the end of the run, so that every validation measures
        the same; each source's next-token loss (nats a token), and the base's; and the routers beside the base's."""
        counts, objective = self.feed.counts(self.feed.validation()), objective_at(self.train, 1.0)
        sums, nats = self._sums(), self._zeros()
        for parts in self.feed.held_out():
            for part, output in self._outputs(parts, self.module, routers=True):
                weights = _NEXT_TOKEN | shares(objective.weights[part.source], counts)
                _, terms = loss_of(part, output, objective, weights)
                sums.add(part, output, terms, weights)
                nats[part.source] += terms[CROSS_ENTROPY]
        if not self._base_losses:
            self._base_losses = self._measure_base(objective)
        return sums.record() | {"losses": self._per_token(nats), "base_losses": self._base_losses}

    def _measure_base(self, objective: Objective) -> dict[str, float]:
        """The base's next-token loss on the validation sequences of each source; it never changes."""
        nats = self._zeros()
        with self.student.base():
            for parts in self.feed.held_out():
                for part, output in self._outputs(parts, self.module):
                    nats[part.source] += loss_of(part, output, objective, _NEXT_TOKEN)[1][CROSS_ENTROPY]
        return self._per_token(nats)

    def _per_token(self, nats: dict[str, Tensor]) -> dict[str, float]:
        """Sums of this worker over validation sequences, as means over those of all workers."""
        tokens = self.feed.num_targets(self.feed.validation())
        totals = trainer.sum_over_workers(torch.stack(list(nats.values()))).tolist()
        return {name: total / max(1, tokens[name]) for name, total in zip(nats, totals, strict=True)}

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros((), dtype=torch.float64, device=self.student.device) for name in self.train.sources}

    def initial_weights(self) -> dict[str, Tensor]:
        """The initial overlay, float32; what it does not hold, differences of trained routers, began at 0.

        Raises:
            ArtefactError: it is missing or damaged.
        """
        _, tensors = load_overlay(self.layout.initial_overlay, self.student.fingerprint)
        return {
            name: tensors[name].float() if name in tensors else torch.zeros_like(parameter)
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def not_finite(self, step: int) -> list[str]:
        """Sequences of a step whose loss is not finite, on any worker, as `SOURCE NUMBER`."""
        objective = objective_at(self.train, step / self.train.steps)
        counts = dict.fromkeys(TERMS, 1)
        found = []
        for source, sequence in self.feed.mine(step):
            part = self.feed.read(source, (sequence,))
            for of_part, output in self._outputs([part], self.module):
                value, _ = loss_of(of_part, output, objective, shares(objective.weights[source], counts))
                if not bool(torch.isfinite(value)):
                    found.append(f"{source} {sequence}")
        return trainer.gathered(found)

    def samples(self) -> list[dict[str, str]]:
        """What the student continues the configured prompts with."""
        section = self.train.samples
        return [continue_text(self.student, prompt, section.tokens) for prompt in section.prompts]

    def close(self) -> None:
        """Stop reading ahead."""
        self.feed.close()

    def _outputs(
        self, parts: list[MicroBatch], module: nn.Module, *, routers: bool = False
    ) -> Iterator[tuple[MicroBatch, Output]]:
        """One forward pass over sequences of several sources; yields each source's part with its outputs."""
        moved = [self._on_device(part, routers=routers) for part in parts]
        input_ids, valid = (torch.cat([getattr(part.batch, name) for part in moved]) for name in ("input_ids", "valid"))
        hidden, router_logits = module(input_ids, valid)
        sizes = [len(part.batch.input_ids) for part in moved]
        selected = self.student.dimensions.experts_per_token
        for part, of_part, of_routers in zip(moved, hidden.split(sizes), router_logits.split(sizes), strict=True):
            yield part, Output(of_part, of_routers, self.student.head, selected)

    def _on_device(self, part: MicroBatch, *, routers: bool) -> MicroBatch:
        batch = part.batch.to(self.student.device)
        section = self.train.sources[part.source]
        online = self.train.mode == "online"
        output = online and section.needs_output
        router = output or (online and bool(section.router_kl)) or (routers and batch.router is None)
        return MicroBatch(part.source, self._taught(batch, output=output, router=router))

    @torch.no_grad()
    def _taught(self, batch: TargetBatch, *, output: bool, router: bool) -> TargetBatch:
        """The batch with what the base says now."""
        if not (output or router):
            return batch
        with self.student.base():
            hidden, router_logits = self.student.hidden_states(batch.input_ids, batch.valid)
        layers = tuple(range(router_logits.shape[2]))
        return replace(
            batch,
            output=HiddenTargets(hidden[:, :-1][batch.loss_mask[:, 1:]]) if output else batch.output,
            router=RouterTargets(layers, 1, logits=router_logits[batch.valid]) if router else batch.router,
        )

    def _sums(self) -> StepSums:
        return StepSums(self.train, self.student.dimensions, self.student.device)


class _Forward(nn.Module):
    """The student as a module that DDP can wrap: its parameters are the trained ones, nothing else."""

    def __init__(self, student: LoadedModel) -> None:
        super().__init__()
        self.shared_experts = student.shared_experts
        self.routers = student.routers
        self._student = [student]  # in a list, so that the frozen base is not registered

    def forward(self, input_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states [B, T, H] and router logits [B, T, L, E]."""
        return self._student[0].hidden_states(input_ids, valid)


def _student(config: Config, layout: RunLayout) -> LoadedModel:
    """The student with its initial overlay, and what is trained of it ready for training."""
    student = load_student(config.model, layout.initial_overlay, trainer.devices())
    if config.train.routers.train != "none":
        student.train_routers(config.train.routers.train)
    if config.train.gradient_checkpointing:
        student.checkpoint_layers()
    return student
