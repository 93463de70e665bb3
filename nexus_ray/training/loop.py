"""The loop that every training shares: steps, merges, validation, the best weights, recovery checkpoints, metrics."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from nexus_ray import worker_log
from nexus_ray.errors import ArtefactError, NexusError, StorageError
from nexus_ray.memory import used_bytes
from nexus_ray.storage import place_of
from nexus_ray.training import trainer, trouble
from nexus_ray.training.averaging import Averaging
from nexus_ray.training.checkpointing import load_checkpoint, take_snapshot
from nexus_ray.training.guards import Progress
from nexus_ray.training.optimiser import drop_frozen_gradients, is_frozen, set_learning_rates
from nexus_ray.training.recovery import RecoveryPoints, newest, remove_leftovers
from nexus_ray.training.settings import LoopSettings
from nexus_ray.training.watching.log import RunLog, open_log

logger = logging.getLogger(__name__)
_GIB = 2**30


class Task(Protocol):
    """What a worker trains."""

    parameters: dict[str, nn.Parameter]
    optimiser: Optimizer

    def accumulate(self, step: int) -> dict[str, Any]:
        """Backward passes of one global batch; returns what to record, with `loss` and `tokens` among it.

        `watched`, where it is there, is what divergence is judged by instead: the part of the loss that means the same
        at every step; None where no part does, and validations decide. It is not recorded.
        """
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


def run_steps(task: Task, settings: LoopSettings) -> None:
    """Train from the last recovery checkpoint to the last step. Called by every worker.

    Raises:
        NexusError: a loss or gradient is not finite, or the loss diverges.
        StorageError: a checkpoint cannot be written; the ones before it are as they were.
    """
    loop = _Loop(task, settings)
    try:
        loop.run()
    except NexusError as error:
        with suppress(StorageError):  # the error that stopped it is the one to be told
            loop.say("stopped", reason=error.message)
        loop.close(failed=True)
        raise
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
        if self.is_first:
            remove_leftovers(settings.layout.directory)
        damaged = self._restore()
        self.log = self._open_log() if self.is_first else None
        for reason in damaged:
            self.say("warning", **trouble.damaged_checkpoint(reason, self.progress))
        if self.progress.step:
            self.say_of(self.progress.step, "resume")

    def run(self) -> None:
        """All steps that are left."""
        worker_log.ready()
        while self.progress.step < self.settings.steps and not self.progress.ended:
            self._step(self.progress.step)
        if self.points is not None:
            self._written(self.points.all_finished())

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
            tell=trainer.tell_driver,
        )

    def say(self, event: str, **values: Any) -> None:
        """Record something about the step that is just over."""
        self.say_of(max(0, self.progress.step - 1), event, **values)

    def say_of(self, step: int, event: str, **values: Any) -> None:
        """Record something about a step (0-based)."""
        if self.log is not None:
            self.log.write(event, step, **values)

    def _restore(self) -> list[str]:
        """Continue from the newest whole checkpoint, the same one on every worker; says why newer ones were not it.

        Raises:
            ArtefactError: there are checkpoints, and none is whole.
        """
        found, damaged = newest(self.settings.layout.checkpoints) if self.is_first else (None, [])
        if damaged and found is None:
            raise trouble.nothing_whole(damaged, self.settings)
        chosen = trainer.from_first_worker(str(found) if found else None)
        if chosen is not None:
            state = load_checkpoint(place_of(chosen), self.task.parameters, self.task.optimiser, self.averaging.kept)
            self.progress = Progress.of_state(state)
        return damaged

    def _step(self, step: int) -> None:
        started = time.monotonic()
        if not self.saved_for_leaving and trainer.node_is_leaving():
            self.saved_for_leaving = True
            self.say("preemption")
            self._checkpoint(wait=True)
        elif self.is_first and trainer.is_checkpoint_wanted():
            self._checkpoint(wait=True)
            trainer.checkpoint_is_written()
        record = self._optimise(step, started)
        self.progress.step = step + 1
        if record is not None:
            watched = record.pop("watched", record["loss"])
            self.say("step", **record)
            self.progress.judged_by_steps = watched is not None
            if watched is not None and self.progress.is_diverging(watched):
                raise trouble.diverging(step, "the loss of the last steps", watched, self.settings, self.progress)
        if self.averaging.is_due(step):
            self._merge()
        last = step + 1 == self.settings.steps
        if last or (step + 1) % self.settings.validate_every == 0:
            self._validate()
        # Weights that give no finite gradient may be broken: they must not take the place of good ones.
        due = (step + 1) % self.settings.checkpoint_every == 0 and not self.progress.skipped
        if last or self.progress.ended or due:
            self._checkpoint()
        elif self.points is not None:
            self._written(self.points.finished())

    def _optimise(self, step: int, started: float) -> dict[str, Any] | None:
        """One optimiser step; returns what to record, or None when it was skipped."""
        task, section = self.task, self.settings.optimiser
        record = task.accumulate(step)
        rates = set_learning_rates(task.optimiser, step, self.settings.steps, section)
        drop_frozen_gradients(task.optimiser)
        norm = float(nn.utils.clip_grad_norm_(task.parameters.values(), section.clip_norm))
        if not (math.isfinite(norm) and math.isfinite(record["loss"])):
            self._not_finite(step, norm, record["loss"])
            return None
        self.progress.skipped = 0
        if any(map(is_frozen, task.optimiser.param_groups)) and not self.progress.biases_frozen:
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
        what = trouble.not_finite(step, norm, loss, names)
        self.progress.skipped += 1
        trouble.raise_if_not_to_be_skipped(what, self.settings, self.progress)
        logger.warning("%s; the step was skipped", what)
        self.say_of(step, "skipped", sequences=names)

    def _merge(self) -> None:
        """Draw the weights to the anchor; without one the training goes on as it is."""
        try:
            moved = self.averaging.merge(self._learning())
        except ArtefactError as error:
            logger.warning("no merge after step %d: %s", self.progress.step, error.message)
            self.say("merge_skipped", reason=error.message)
        else:
            self.say("merge", moved=moved, anchor=self.settings.averaging.anchor)

    def _learning(self) -> list[str]:
        """Names of the parameters that are not frozen by now."""
        frozen = {id(p) for group in self.task.optimiser.param_groups if is_frozen(group) for p in group["params"]}
        return [name for name, parameter in self.task.parameters.items() if id(parameter) not in frozen]

    def _validate(self) -> None:
        """Validate, and keep the weights when they are the best so far."""
        record = self.task.validate()
        self.say("validation", **record)
        self._judge(record)
        if self.log is not None:
            for sample in self.task.samples():
                self.say("sample", **sample)
        if self.progress.is_best(record["loss"], self.settings.early_stop) and self.points is not None:
            parameters, state = self.task.parameters, self.progress.as_state()
            self.points.write_best(self.settings.layout.best, lambda: take_snapshot(parameters, state))
            self.say("best", loss=record["loss"])
        if self.progress.ended:
            self.say("early_stop", validations_without_gain=self.progress.without_gain)
        trainer.tell_ray({"step": float(self.progress.step), "validation_loss": record["loss"]})

    def _judge(self, record: Mapping[str, Any]) -> None:
        """Stop at a validation loss that is not finite, or that has run away where steps cannot tell.

        Raises:
            NexusError: as configured.
        """
        step, loss = self.progress.step - 1, record["loss"]
        if not math.isfinite(loss):
            warning = trouble.validation_not_finite(step, record, self.settings, self.progress)
            self.say("warning", **warning)
        elif self.progress.is_diverging_validation(loss):
            raise trouble.diverging(step, "the validation loss", loss, self.settings, self.progress)

    def _checkpoint(self, *, wait: bool = False) -> None:
        """Copy everything and write it in the background."""
        if self.points is None or self.log is None:
            return
        self._written(self.points.finished(wait=True))  # one copy of everything at a time
        state = self.progress.as_state()
        snapshot = take_snapshot(self.task.parameters, state, self.task.optimiser, self.averaging.kept)
        self.points.write(snapshot, before=self.log.store)  # a training that goes on from it knows what came before
        if wait:
            self._written(self.points.finished(wait=True))

    def _written(self, steps: list[int]) -> None:
        for step in steps:
            self.say_of(step - 1, "checkpoint")
