"""What a training watches itself for: a loss that diverges, and validations that no longer gain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from nexus_ray.config import EarlyStopSection

_WINDOW = 20  # steps whose mean loss is compared
_DIVERGED_NATS = 2.0  # above the lowest such mean


@dataclass
class Progress:
    """What a training remembers besides weights and moments; goes into every checkpoint.

    Attributes:
        step: finished optimiser steps.
        best: lowest validation loss so far, in nats.
        best_step: finished steps when it was measured.
        without_gain: validations since then.
        ended: whether it has ended before its last step.
        mark: validation loss that the next gain is measured from, in nats.
        biases_frozen: whether router biases have stopped learning.
        skipped: steps in a row whose gradients were not finite.
        recent: losses of the last steps, in nats.
        lowest: lowest mean of as many steps so far.
        judged_by_steps: whether a part of the loss means the same at every step, so that steps show divergence.
    """

    step: int = 0
    best: float | None = None
    best_step: int = 0
    without_gain: int = 0
    ended: bool = False
    biases_frozen: bool = False
    mark: float | None = None
    skipped: int = 0
    recent: list[float] = field(default_factory=list)
    lowest: float | None = None
    judged_by_steps: bool = True

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Self:
        """From what `as_state` gave, in this version or another."""
        names = {known.name for known in fields(cls)}
        return cls(**{name: value for name, value in state.items() if name in names})

    def as_state(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        return asdict(self)

    def is_diverging(self, loss: float) -> bool:
        """Take note of a step's loss; true when the mean of the last 20 is 2 nats above the lowest such mean."""
        self.recent = [*self.recent, loss][-_WINDOW:]
        if len(self.recent) < _WINDOW:
            return False
        mean = math.fsum(self.recent) / _WINDOW
        self.lowest = mean if self.lowest is None else min(self.lowest, mean)
        return mean > self.lowest + _DIVERGED_NATS

    def is_diverging_validation(self, loss: float) -> bool:
        """Whether a validation's loss is 2 nats above the best, where steps cannot be compared with each other."""
        return not self.judged_by_steps and self.best is not None and loss > self.best + _DIVERGED_NATS

    def is_best(self, loss: float, section: EarlyStopSection) -> bool:
        """Take note of a validation; true when it is the best so far. Ends the training when patience is over."""
        gained = math.isfinite(loss) and (self.best is None or loss < self.best)
        enough = gained and (self.mark is None or loss < self.mark - section.min_gain)
        self.without_gain = 0 if enough else self.without_gain + 1
        self.mark = loss if enough else self.mark
        if section.patience is not None and self.without_gain >= section.patience:
            self.ended = True
        if gained:
            self.best, self.best_step = loss, self.step
        return gained
