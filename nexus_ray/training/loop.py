"""The loop that every training shares: steps, validation, the best weights, recovery checkpoints, metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nexus_ray.config import OptimiserSection
from nexus_ray.errors import NexusError
from nexus_ray.training import trainer
from nexus_ray.training.checkpointing import save_checkpoint
from nexus_ray.training.metrics import MetricsLog
from nexus_ray.training.schedule import learning_rate


class Task(Protocol):
    """What a worker trains."""

    parameters: dict[str, nn.Parameter]
    optimiser: torch.optim.Optimizer

    def accumulate(self, step: int) -> dict[str, float]:
        """Backward passes of one global batch; returns what to record, with `loss` among it."""
        ...

    def validate(self) -> dict[str, Any]:
        """What to record about the validation sequences; `loss` decides which weights are best."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """How long, how often, and where to."""

    steps: int
    optimiser: OptimiserSection
    validate_every: int
    checkpoint_every: int
    best: Path
    metrics: Path


def run_steps(task: Task, settings: LoopSettings) -> None:
    """Train from the last recovery checkpoint to the last step. Called by every worker.

    Raises:
        NexusError: the loss is no longer a number.
    """
    state = {"step": 0, "best": None} | trainer.restore(task.parameters, task.optimiser)
    rank, _ = trainer.world()
    log = MetricsLog(settings.metrics, state["step"]) if rank == 0 else None
    if log and state["step"]:
        log.write("resume", state["step"])
    for step in range(state["step"], settings.steps):
        record = _optimise(task, settings, step)
        if log:
            log.write("step", step, **record)
        state["step"] = step + 1
        last = step + 1 == settings.steps
        if last or (step + 1) % settings.validate_every == 0:
            _validate(task, settings, state, log)
        if last or (step + 1) % settings.checkpoint_every == 0:
            trainer.checkpoint(task.parameters, task.optimiser, state, {"step": float(step)})
            if log:
                log.write("checkpoint", step)


def _optimise(task: Task, settings: LoopSettings, step: int) -> dict[str, float]:
    """One optimiser step."""
    started = time.monotonic()
    section = settings.optimiser
    record = task.accumulate(step)
    norm = float(nn.utils.clip_grad_norm_(task.parameters.values(), section.clip_norm))
    if not torch.isfinite(torch.tensor([norm, record["loss"]])).all():
        raise NexusError(
            f"step {step}: the loss is {record['loss']} and the gradient norm {norm}; nothing was updated",
            f"lower train.optimiser.learning_rate (now {section.learning_rate}); the last good weights are in "
            f"{settings.best}",
        )
    lr = learning_rate(step, settings.steps, section.learning_rate, section.schedule)
    for group in task.optimiser.param_groups:
        group["lr"] = lr
    task.optimiser.step()
    task.optimiser.zero_grad()
    seconds = time.monotonic() - started
    return record | {
        "gradient_norm": norm,
        "clipped": norm > section.clip_norm,
        "learning_rate": lr,
        "seconds": seconds,
    }


def _validate(task: Task, settings: LoopSettings, state: dict[str, Any], log: MetricsLog | None) -> None:
    """Validate, and keep the weights when they are the best so far."""
    record = task.validate()
    is_best = state["best"] is None or record["loss"] < state["best"]
    if is_best:
        state["best"] = record["loss"]
    if log is None:
        return
    step = state["step"] - 1
    log.write("validation", step, **record)
    if is_best:
        save_checkpoint(settings.best, task.parameters, task.optimiser, state)
        log.write("best", step, loss=record["loss"])


def adamw(parameters: dict[str, nn.Parameter], section: OptimiserSection) -> torch.optim.AdamW:
    """AdamW whose weight decay leaves biases, norms, scales and attention sinks alone."""
    decayed = [p for name, p in parameters.items() if not _undecayed(name)]
    kept = [p for name, p in parameters.items() if _undecayed(name)]
    groups = [
        {"params": decayed, "weight_decay": section.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=(section.beta1, section.beta2))


def _undecayed(name: str) -> bool:
    return name.endswith(("bias", "sinks", "scale")) or "norm" in name


def sum_over_workers(values: Tensor) -> Tensor:
    """Add `values` over all workers, in place."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values
