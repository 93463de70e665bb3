"""The loop that every training shares: steps, merges, validation, the best weights, recovery checkpoints, metrics."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from nexus_ray.config import AveragingSection, EarlyStopSection, OptimiserSection, TrackersSection, WarningsSection
from nexus_ray.errors import ArtefactError, NexusError
from nexus_ray.layout import RunLayout
from nexus_ray.memory import used_bytes
from nexus_ray.training import trainer
from nexus_ray.training.averaging import Averaging
from nexus_ray.training.checkpointing import load_checkpoint, take_snapshot, write_snapshot
from nexus_ray.training.guards import Progress
from nexus_ray.training.optimiser import learning_parameters, set_learning_rates
from nexus_ray.training.recovery import RecoveryPoints, newest
from nexus_ray.training.watching.log import RunLog, open_log

logger = logging.getLogger(__name__)
_MOST_SKIPPED = 10  # steps in a row without a finite gradient: more is no accident
_GIB = 2**30


class Task(Protocol):
    """What a worker trains."""

    parameters: dict[str, nn.Parameter]
    optimiser: Optimizer

    def accumulate(self, step: int) -> dict[str, Any]:
        """Backward passes of one global batch; returns what to record, with `loss` among it."""
        ...

    def validate(self) -> dict[str, Any]:
        """What to record about the validation sequences; `loss` decides which weights are best."""
        ...

    def initial_weights(self) -> Mapping[str, Tensor]:
        """The trained parameters as the training began.

        Raises:
            ArtefactError: they cannot be read any more.
        """
        ...

    def not_finite(self, step: int) -> list[str]:
        """The sequences of a step whose loss is not finite, by name; all workers must call it."""
        ...

    def samples(self) -> list[dict[str, str]]:
        """What the model continues prompts with; called by one worker."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """How long, how often, and where to.

    Attributes:
        steps: optimiser steps of the whole training.
        optimiser: learning rates and clipping.
        validate_every: steps between validations.
        checkpoint_every: steps between recovery checkpoints.
        keep_checkpoints: recovery checkpoints kept.
        layout: where checkpoints, best weights and metrics go.
        averaging: merges with an anchor.
        early_stop: ending before the last step.
        on_nan: what to do with a loss or gradient that is not finite.
        trackers: where metrics go too.
        warnings: from where on to warn.
        roles: of each source, for warnings.
        parameters: the configuration by dotted name, for trackers.
    """

    steps: int
    optimiser: OptimiserSection
    validate_every: int
    checkpoint_every: int
    keep_checkpoints: int
    layout: RunLayout
    averaging: AveragingSection = field(default_factory=AveragingSection)
    early_stop: EarlyStopSection = field(default_factory=EarlyStopSection)
    on_nan: Literal["stop", "skip"] = "stop"
    trackers: TrackersSection = field(default_factory=TrackersSection)
    warnings: WarningsSection = field(default_factory=WarningsSection)
    roles: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)


def run_steps(task: Task, settings: LoopSettings) -> None:
    """Train from the last recovery checkpoint to the last step. Called by every worker.

    Raises:
        NexusError: a loss or gradient is not finite, or the loss diverges.
        StorageError: a checkpoint cannot be written; the ones before it are as they were.
    """
    loop = _Loop(task, settings)
    try:
        loop.run()
    except BaseException:
        loop.close(failed=True)
        raise
    loop.close(failed=False)


class _Loop:
    """One worker's part of a training; the first worker writes."""

    def __init__(self, task: Task, settings: LoopSettings) -> None:
        self.task = task
        self.settings = settings
        self.averaging = Averaging(settings.averaging, task.parameters, task.initial_weights)
        self.progress = Progress()
        self.is_first = trainer.world()[0] == 0
        self.points = RecoveryPoints(settings.layout.checkpoints, settings.keep_checkpoints) if self.is_first else None
        self.saved_for_leaving = False
        self._restore()
        self.log = self._open_log() if self.is_first else None
        if self.progress.step:
            self.say_of(self.progress.step, "resume")

    def run(self) -> None:
        """All steps that are left."""
        while self.progress.step < self.settings.steps and not self.progress.ended:
            self._step(self.progress.step)
        if self.points is not None:
            self._written(self.points.finished(wait=True))

    def close(self, *, failed: bool) -> None:
        """Let everything end that goes on in the background."""
        if self.points is not None:
            self.points.close()
        if self.log is not None:
            self.log.close(failed=failed)

    def _open_log(self) -> RunLog:
        settings = self.settings
        return open_log(
            settings.layout,
            self.progress.step,
            trackers=settings.trackers,
            warnings=settings.warnings,
            roles=settings.roles,
            parameters=settings.parameters,
        )

    def say(self, event: str, **values: Any) -> None:
        """Record something about the step that is just over."""
        self.say_of(max(0, self.progress.step - 1), event, **values)

    def say_of(self, step: int, event: str, **values: Any) -> None:
        """Record something about a step (0-based)."""
        if self.log is not None:
            self.log.write(event, step, **values)

    def _restore(self) -> None:
        """Continue from the newest whole checkpoint, the same one on every worker."""
        found = newest(self.settings.layout.checkpoints) if self.is_first else None
        chosen = trainer.from_first_worker(str(found) if found else None)
        if chosen is not None:
            state = load_checkpoint(Path(chosen), self.task.parameters, self.task.optimiser, self.averaging.kept)
            self.progress = Progress(**state)

    def _step(self, step: int) -> None:
        started = time.monotonic()
        if not self.saved_for_leaving and trainer.node_is_leaving():
            self.saved_for_leaving = True
            self.say("preemption")
            self._checkpoint(wait=True)
        record = self._optimise(step, started)
        self.progress.step = step + 1
        if record is not None:
            self.say("step", **record)
            self._stop_if_diverging(step, record["loss"])
        if self.averaging.is_due(step):
            self._merge()
        last = step + 1 == self.settings.steps
        if last or (step + 1) % self.settings.validate_every == 0:
            self._validate()
        if last or self.progress.ended or (step + 1) % self.settings.checkpoint_every == 0:
            self._checkpoint()
        elif self.points is not None:
            self._written(self.points.finished())

    def _optimise(self, step: int, started: float) -> dict[str, Any] | None:
        """One optimiser step; returns what to record, or None when it was skipped."""
        task, section = self.task, self.settings.optimiser
        record = task.accumulate(step)
        rates = set_learning_rates(task.optimiser, step, self.settings.steps, section)
        norm = float(nn.utils.clip_grad_norm_(learning_parameters(task.optimiser), section.clip_norm))
        if not (math.isfinite(norm) and math.isfinite(record["loss"])):
            self._not_finite(step, norm, record["loss"])
            return None
        self.progress.skipped = 0
        if rates.get("router_bias_learning_rate") == 0.0 and not self.progress.biases_frozen:
            self.progress.biases_frozen = True
            self.say_of(step, "bias_frozen")
        task.optimiser.step()
        task.optimiser.zero_grad()
        seconds = time.monotonic() - started
        return record | {
            "gradient_norm": norm,
            "clipped": norm > section.clip_norm,
            **rates,
            "seconds": seconds,
            "tokens_per_second": record["tokens"] / seconds,
            "memory_gib": used_bytes(next(iter(task.parameters.values())).device) / _GIB,
        }

    def _not_finite(self, step: int, norm: float, loss: float) -> None:
        """Throw the gradients of a step away, and stop, or say which sequences they came from.

        Raises:
            NexusError: as configured, or too many such steps in a row.
        """
        self.task.optimiser.zero_grad()
        names = self.task.not_finite(step)
        where = f"sequences {', '.join(names)}" if names else "no single sequence: the sum of their gradients"
        what = f"step {step}: the loss is {loss} and the gradient norm {norm}; it comes from {where}"
        self.progress.skipped += 1
        if self.settings.on_nan == "stop":
            raise NexusError(
                f"{what}; nothing was updated",
                "look at these sequences; train.on_nan=skip passes over such steps; or lower "
                f"train.optimiser.learning_rate (now {self.settings.optimiser.learning_rate:g}). {self._last_good()}",
            )
        if self.progress.skipped >= _MOST_SKIPPED:
            raise NexusError(
                f"{what}, as in the {_MOST_SKIPPED - 1} steps before it",
                f"lower train.optimiser.learning_rate (now {self.settings.optimiser.learning_rate:g}) and start over "
                f"with --force. {self._last_good()}",
            )
        logger.warning("%s; the step was skipped", what)
        self.say_of(step, "skipped", sequences=names)

    def _stop_if_diverging(self, step: int, loss: float) -> None:
        if self.progress.is_diverging(loss):
            raise NexusError(
                f"step {step}: the training diverges: the loss of the last steps is around {loss:.2f} nats, "
                f"it was {self.progress.lowest:.2f}",
                f"lower train.optimiser.learning_rate (now {self.settings.optimiser.learning_rate:g}) and start over "
                f"with --force. {self._last_good()}",
            )

    def _last_good(self) -> str:
        if self.progress.best is None:
            return "There is no validated checkpoint yet"
        return f"The best weights so far, after {self.progress.best_step} steps, are in {self.settings.layout.best}"

    def _merge(self) -> None:
        """Draw the weights to the anchor; without one the training goes on as it is."""
        try:
            moved = self.averaging.merge()
        except ArtefactError as error:
            logger.warning("no merge after step %d: %s", self.progress.step, error.message)
            self.say("merge_skipped", reason=error.message)
        else:
            self.say("merge", moved=moved, anchor=self.settings.averaging.anchor)

    def _validate(self) -> None:
        """Validate, and keep the weights when they are the best so far."""
        record = self.task.validate()
        self.say("validation", **record)
        if self.log is not None:
            for sample in self.task.samples():
                self.say("sample", **sample)
        if self.progress.is_best(record["loss"], self.settings.early_stop) and self.is_first:
            write_snapshot(self.settings.layout.best, take_snapshot(self.task.parameters, self.progress.as_state()))
            self.say("best", loss=record["loss"])
        if self.progress.ended:
            self.say("early_stop", validations_without_gain=self.progress.without_gain)
        trainer.tell_ray({"step": float(self.progress.step), "validation_loss": record["loss"]})

    def _checkpoint(self, *, wait: bool = False) -> None:
        """Copy everything and write it in the background."""
        if self.points is None:
            return
        snapshot = take_snapshot(
            self.task.parameters, self.progress.as_state(), self.task.optimiser, self.averaging.kept
        )
        self._written(self.points.write(snapshot))
        if wait:
            self._written(self.points.finished(wait=True))

    def _written(self, steps: list[int]) -> None:
        for step in steps:
            self.say_of(step - 1, "checkpoint")
