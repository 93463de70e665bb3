"""Schedules: pure functions of the step, so that a resumed run continues exactly."""

from __future__ import annotations

import math

from nexus_ray.config import ScheduleSection


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleSection) -> float:
    """Learning rate of the optimiser step number `step` (0-based) of `steps`.

    Linear warm-up to `peak`, constant, then decay to `floor * peak` by a cosine or a straight line.
    """
    warmup_steps = schedule.warmup * steps
    decay_steps = schedule.decay * steps
    if step < warmup_steps:
        return peak * min(1.0, (step + 1) / warmup_steps)
    into_decay = step + 1 - (steps - decay_steps)
    if into_decay <= 0:
        return peak
    progress = min(1.0, into_decay / decay_steps)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule.shape == "cosine" else 1 - progress
    return peak * (schedule.floor + (1 - schedule.floor) * remaining)
