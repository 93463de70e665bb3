"""Distilling shared experts: cross-entropy where there is something to learn, KL to the base where there is
something to keep.

Only the shared experts have gradients. The teacher is stored (offline) or the same model with its shared experts
switched off (online): the base is in memory once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nexus_ray.checkpoints.overlay import OverlayConfig, load_overlay, load_overlay_config, save_overlay
from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.cluster import set_worker_threads
from nexus_ray.config import Config
from nexus_ray.errors import ArtefactError, ConfigError, DataError
from nexus_ray.families import family_of
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import LoadedModel, activation, load_shared_experts, load_student
from nexus_ray.targets.format import REMAKE, Manifest
from nexus_ray.targets.reader import TargetBatch, TargetSet
from nexus_ray.training import losses, trainer
from nexus_ray.training.checkpointing import load_checkpoint
from nexus_ray.training.loop import LoopSettings, adamw, run_steps, sum_over_workers
from nexus_ray.training.objective import (
    TERMS,
    MicroBatch,
    Teacher,
    combine,
    term_counts,
    token_sums,
    weight_of,
)
from nexus_ray.training.order import Rows, SourceOrder, share

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
    check_targets(Manifest.load(layout.targets), config, description)
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


def check_targets(manifest: Manifest, config: Config, description: OverlayConfig) -> None:
    """Refuse targets that were made for something else, lack what a loss needs, or are too few.

    Raises:
        ArtefactError, ConfigError, DataError: as `train`.
    """
    if manifest.base_fingerprint != description.base_fingerprint:
        raise ArtefactError("the targets were made with another base model than the overlay", REMAKE)
    held: dict[str, int] = {}
    for file in manifest.files:
        held[file.source] = held.get(file.source, 0) + file.sequences
    for name, section in config.train.sources.items():
        needed = config.train.validation_sequences + section.sequences_per_step
        if held.get(name, 0) < needed:
            raise DataError(
                f"source {name} has {held.get(name, 0)} sequences; validation and one step need {needed}",
                "add text, or lower train.validation_sequences or data.sequence_length",
            )
        wants_teacher = config.train.mode == "offline" and (section.output_kl or section.router_kl)
        if wants_teacher and name not in manifest.teacher_sources:
            raise ArtefactError(f"the targets hold no teacher output for source {name}", REMAKE)
    per_step = sum(section.sequences_per_step for section in config.train.sources.values())
    if per_step < config.resources.workers:
        raise ConfigError(
            f"train.sources: a step has {per_step} sequences, fewer than resources.workers={config.resources.workers}"
        )


class _Forward(nn.Module):
    """The student as a module that DDP can wrap: its parameters are the shared experts', nothing else."""

    def __init__(self, student: LoadedModel) -> None:
        super().__init__()
        assert student.shared_experts is not None
        self.shared_experts = student.shared_experts
        self._student = [student]  # in a list, so that the frozen base is not registered

    def forward(self, input_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and router logits [B, T, L, E]."""
        return self._student[0].forward(input_ids, valid)


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
        self.targets = TargetSet.open(layout.targets)
        self.orders = {
            name: SourceOrder(
                self.targets.rows(name),
                section.sequences_per_step,
                config.train.validation_sequences,
                config.run.seed,
                name,
            )
            for name, section in config.train.sources.items()
        }

    def accumulate(self, step: int) -> dict[str, float]:
        """Backward passes of one global batch; records the loss and each of its terms (nats a token)."""
        rows = {name: order.training_rows(step) for name, order in self.orders.items()}
        counts = self._counts(rows)
        groups = list(self._share(rows))
        _, world_size = trainer.world()
        totals = torch.zeros(len(TERMS), device=self.student.device)
        for index, group in enumerate(groups):
            with trainer.synchronise_if(self.parallel, index == len(groups) - 1):
                loss = torch.zeros((), device=self.student.device)
                for batch, logits, router_logits in self._outputs(group, self.parallel):
                    sums = self._sums(batch, logits, router_logits)
                    loss = loss + combine(sums, self.train.sources[batch.source], counts)
                    totals += self._weighted(sums, batch.source, counts)
                # DDP averages gradients over workers: the global mean needs the factor back.
                (loss * world_size).backward()
        terms = dict(zip(TERMS, sum_over_workers(totals).tolist(), strict=True))
        tokens = sum(self.targets.count_targets(part) for part in rows.values())
        return {"loss": sum(terms.values()), **_present(terms, counts), "tokens": tokens}

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """The objective on the validation sequences, and each source's next-token loss (nats a token)."""
        rows = {name: order.validation_rows() for name, order in self.orders.items()}
        counts = self._counts(rows)
        names = list(self.orders)
        totals = torch.zeros(len(TERMS), device=self.student.device)
        nats = torch.zeros(len(names), device=self.student.device)
        for group in self._share(rows):
            for batch, logits, router_logits in self._outputs(group, self.module):
                totals += self._weighted(self._sums(batch, logits, router_logits), batch.source, counts)
                per_token = losses.cross_entropy(logits, batch.input_ids) * batch.valid[:, 1:]
                nats[names.index(batch.source)] += per_token.sum()
        terms = dict(zip(TERMS, sum_over_workers(totals).tolist(), strict=True))
        per_source = zip(names, sum_over_workers(nats).tolist(), strict=True)
        return {
            "loss": sum(terms.values()),
            **_present(terms, counts),
            "losses": {name: total / max(1, self.targets.count_targets(rows[name])) for name, total in per_source},
        }

    def _share(self, rows: dict[str, Rows]) -> Iterator[list[tuple[str, Rows]]]:
        """This worker's micro-batches; each lists its sequences by source. Workers take turns along the batch."""
        rank, world_size = trainer.world()
        names = np.repeat(list(rows), [len(part) for part in rows.values()])[rank::world_size]
        mine = share(np.concatenate(list(rows.values())), rank, world_size)
        for start in range(0, len(mine), self.train.micro_batch_sequences):
            part = slice(start, start + self.train.micro_batch_sequences)
            yield [(str(name), mine[part][names[part] == name]) for name in dict.fromkeys(names[part])]

    def _outputs(self, group: list[tuple[str, Rows]], module: nn.Module) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
        """One forward pass over sequences of several sources; yields each source's part with its outputs."""
        batches = [self._micro_batch(name, rows) for name, rows in group]
        input_ids = torch.cat([batch.input_ids for batch in batches])
        logits, router_logits = module(input_ids, torch.cat([batch.valid for batch in batches]))
        sizes = [len(batch.input_ids) for batch in batches]
        yield from zip(batches, logits.split(sizes), router_logits.split(sizes), strict=True)

    def _counts(self, rows: dict[str, Rows]) -> dict[str, int]:
        targets = {name: self.targets.count_targets(part) for name, part in rows.items()}
        tokens = {name: targets[name] + len(part) for name, part in rows.items()}
        return term_counts(self.train.sources, targets, tokens)

    def _micro_batch(self, name: str, rows: Rows) -> MicroBatch:
        stored = self.targets.read(rows)
        device = self.student.device
        input_ids, valid = stored.input_ids.to(device), stored.valid.to(device)
        online = self.train.mode == "online"
        teacher = self._online_teacher(name, input_ids, valid) if online else self._stored_teacher(stored)
        return MicroBatch(name, input_ids, valid, teacher)

    def _stored_teacher(self, stored: TargetBatch) -> Teacher:
        device = self.student.device
        router_logits = stored.router_logits
        if router_logits is not None:
            dimensions = self.student.dimensions
            router_logits = router_logits.view(*stored.input_ids.shape, dimensions.layers, dimensions.experts)
            router_logits = router_logits.to(device).float()
        return Teacher(top=stored.top.to(device) if stored.top else None, router_logits=router_logits)

    @torch.no_grad()
    def _online_teacher(self, name: str, input_ids: Tensor, valid: Tensor) -> Teacher:
        section = self.train.sources[name]
        if not (section.output_kl or section.router_kl):
            return Teacher()
        with self.student.base():
            logits, router_logits = self.student.forward(input_ids, valid)
        return Teacher(logits=logits, router_logits=router_logits)

    def _sums(self, batch: MicroBatch, logits: Tensor, router_logits: Tensor) -> dict[str, Tensor]:
        section = self.train.sources[batch.source]
        return token_sums(batch, logits, router_logits, section, self.train.router_temperature)

    def _weighted(self, sums: dict[str, Tensor], name: str, counts: dict[str, int]) -> Tensor:
        """[terms] each term's part of the global loss."""
        section = self.train.sources[name]
        zero = torch.zeros((), device=self.student.device)
        parts = [
            sums[term].detach().float() * weight_of(section, term) / counts[term] if term in sums else zero
            for term in TERMS
        ]
        return torch.stack(parts)


def _present(terms: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
    """The terms that any source has a weight for."""
    return {term: value for term, value in terms.items() if counts[term]}


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
    run_steps(DistilTask(config, layout), settings)


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
