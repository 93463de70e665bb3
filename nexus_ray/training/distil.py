"""Distilling shared experts: cross-entropy where there is something to learn, KL to the base where there is
something to keep.

Only the shared experts have gradients. The teacher is stored (offline) or the same model with its shared experts
switched off (online): the base is in memory once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nexus_ray.checkpoints.overlay import OverlayConfig, load_overlay, load_overlay_config, save_overlay
from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.cluster import set_worker_threads
from nexus_ray.config import Config
from nexus_ray.data.vocabulary import tokenizer_digest
from nexus_ray.families import family_of
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import LoadedModel, activation, load_shared_experts, load_student
from nexus_ray.targets.reading.reader import TargetBatch, TargetSet
from nexus_ray.targets.teacher import HiddenTargets, RouterTargets
from nexus_ray.training import trainer
from nexus_ray.training.checkpointing import load_checkpoint
from nexus_ray.training.chunked import CROSS_ENTROPY
from nexus_ray.training.feed import Feed
from nexus_ray.training.loop import LoopSettings, adamw, run_steps, sum_over_workers
from nexus_ray.training.objective import TERMS, MicroBatch, Output, loss_of, shares
from nexus_ray.training.readiness import check_targets, report_epochs

logger = logging.getLogger(__name__)


def train(config: Config, layout: RunLayout) -> OverlayConfig:
    """Train the initial overlay of a run and write the best weights as its overlay.

    Raises:
        ArtefactError: the initial overlay or the targets are missing or do not fit.
        ConfigError: fewer sequences in a step than workers.
        DataError: a source has too few sequences.
        NexusError: training failed.
    """
    description = load_overlay_config(layout.initial_overlay)
    manifest = TargetSet.open(layout.targets).manifest
    check_targets(manifest, config, description)
    report_epochs(manifest, config)
    arguments = {"config": config.model_dump(mode="json")}
    trainer.run_distributed(
        _loop,
        arguments,
        layout.training,
        config.resources,
        keep_checkpoints=config.train.keep_checkpoints,
        metrics=layout.metrics,
        steps=config.train.steps,
    )
    return _write_best(description, config, layout)


class _Forward(nn.Module):
    """The student as a module that DDP can wrap: its parameters are the shared experts', nothing else."""

    def __init__(self, student: LoadedModel) -> None:
        super().__init__()
        assert student.shared_experts is not None
        self.shared_experts = student.shared_experts
        self._student = [student]  # in a list, so that the frozen base is not registered

    def forward(self, input_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Final hidden states [B, T, H] and router logits [B, T, L, E]."""
        return self._student[0].hidden_states(input_ids, valid)


class DistilTask:
    """Distillation on one worker."""

    def __init__(self, config: Config, layout: RunLayout) -> None:
        set_worker_threads(config.resources)
        torch.manual_seed(config.run.seed)
        self.train = config.train
        self.student = load_student(config.model, layout.initial_overlay, trainer.devices())
        assert self.student.shared_experts is not None
        assert self.student.overlay is not None
        experts = self.student.shared_experts.requires_grad_(True)
        for name, parameter in experts.named_parameters():
            if name.endswith("scale"):
                parameter.requires_grad_(self.student.overlay.learn_scale)
        self.parameters = {name: p for name, p in experts.named_parameters() if p.requires_grad}
        self.optimiser: torch.optim.Optimizer = adamw(self.parameters, config.train.optimiser)
        self.module = _Forward(self.student)
        self.parallel = trainer.data_parallel(self.module)
        targets = TargetSet.open(layout.targets, self.student.fingerprint, tokenizer_digest(self.student.tokenizer))
        self.feed = Feed(targets, config, *trainer.world())

    def accumulate(self, step: int) -> dict[str, float]:
        """Backward passes of one global batch; records the loss and each of its terms (nats a token)."""
        batch = self.feed.training(step)
        counts = self.feed.counts(batch)
        terms = self._zeros(TERMS)
        for parts, is_last in self.feed.step(step):
            with trainer.synchronise_if(self.parallel, is_last):
                self._backward(parts, counts, terms)
        return _record(terms, counts) | {"tokens": sum(self.feed.num_targets(batch).values())}

    def _backward(self, parts: list[MicroBatch], counts: dict[str, int], terms: dict[str, Tensor]) -> None:
        """One micro-batch, of which nothing is left but gradients and what is added to `terms`."""
        loss = torch.zeros((), dtype=torch.float64, device=self.student.device)
        for part, output in self._outputs(parts, self.parallel):
            weights = shares(self.train.sources[part.source], counts)
            value, sums = loss_of(part, output, self.train, weights)
            loss = loss + value
            _add(terms, sums, weights)
        # DDP averages gradients over workers: the global mean needs the factor back.
        (loss * trainer.world()[1]).backward()

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """The objective on the validation sequences, and each source's next-token loss (nats a token)."""
        batch = self.feed.validation()
        counts, tokens = self.feed.counts(batch), self.feed.num_targets(batch)
        terms, nats = self._zeros(TERMS), self._zeros(tuple(batch))
        for parts in self.feed.held_out():
            for part, output in self._outputs(parts, self.module):
                weights = {CROSS_ENTROPY: 0.0} | shares(self.train.sources[part.source], counts)
                _, sums = loss_of(part, output, self.train, weights)
                _add(terms, sums, weights)
                nats[part.source] += sums[CROSS_ENTROPY]
        losses = {name: value / max(1, tokens[name]) for name, value in _over_workers(nats).items()}
        return _record(terms, counts) | {"losses": losses}

    def close(self) -> None:
        """Stop reading ahead."""
        self.feed.close()

    def _outputs(self, parts: list[MicroBatch], module: nn.Module) -> Iterator[tuple[MicroBatch, Output]]:
        """One forward pass over sequences of several sources; yields each source's part with its outputs."""
        moved = [self._on_device(part) for part in parts]
        input_ids, valid = (torch.cat([getattr(part.batch, name) for part in moved]) for name in ("input_ids", "valid"))
        hidden, router_logits = module(input_ids, valid)
        sizes = [len(part.batch.input_ids) for part in moved]
        for part, of_part, routers in zip(moved, hidden.split(sizes), router_logits.split(sizes), strict=True):
            yield part, Output(of_part, routers, self.student.head)

    def _on_device(self, part: MicroBatch) -> MicroBatch:
        batch = part.batch.to(self.student.device)
        return MicroBatch(part.source, self._taught(part.source, batch) if self.train.mode == "online" else batch)

    @torch.no_grad()
    def _taught(self, source: str, batch: TargetBatch) -> TargetBatch:
        """The batch with what the base says now."""
        section = self.train.sources[source]
        if not (section.output_kl or section.router_kl):
            return batch
        with self.student.base():
            hidden, router_logits = self.student.hidden_states(batch.input_ids, batch.valid)
        output = HiddenTargets(hidden[:, :-1][batch.loss_mask[:, 1:]]) if section.output_kl else None
        layers = tuple(range(router_logits.shape[2]))
        router = RouterTargets(layers, 1, logits=router_logits[batch.valid]) if section.router_kl else None
        return replace(batch, output=output, router=router)

    def _zeros(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: torch.zeros((), dtype=torch.float64, device=self.student.device) for name in names}


def _add(terms: dict[str, Tensor], sums: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
    """Add a micro-batch's part of the global loss, by term."""
    for term, value in sums.items():
        terms[term] += value * weights[term]


def _over_workers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Values added up over all workers."""
    return dict(zip(values, sum_over_workers(torch.stack(list(values.values()))).tolist(), strict=True))


def _record(terms: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, float]:
    """The global loss, and those of its terms that any source has a weight for."""
    totals = _over_workers(terms)
    return {"loss": sum(totals.values())} | {term: value for term, value in totals.items() if counts[term]}


def _loop(arguments: dict[str, Any]) -> None:
    """Ray Train's per-worker function."""
    config = Config.model_validate(arguments["config"])
    layout = RunLayout(config.run.directory)
    settings = LoopSettings(
        steps=config.train.steps,
        optimiser=config.train.optimiser,
        validate_every=config.train.validate_every,
        checkpoint_every=config.train.checkpoint_every,
        best=layout.best,
        metrics=layout.metrics,
    )
    task = DistilTask(config, layout)
    try:
        run_steps(task, settings)
    finally:
        task.close()


def _write_best(initial: OverlayConfig, config: Config, layout: RunLayout) -> OverlayConfig:
    """Turn the best checkpoint into the run's overlay."""
    model_config = read_model_config(config.model.path)
    _, tensors = load_overlay(layout.initial_overlay, initial.base_fingerprint)
    experts = load_shared_experts(initial, tensors, activation(family_of(model_config), model_config))
    trained = {name: p for name, p in experts.named_parameters() if not name.endswith("scale") or initial.learn_scale}
    state = load_checkpoint(layout.best, trained)
    description = initial.model_copy(update={"trained_steps": state["step"]})
    save_overlay(layout.overlay, description, dict(experts.state_dict()))
    logger.info("overlay written: the weights after step %d of %d", state["step"], config.train.steps)
    return description
