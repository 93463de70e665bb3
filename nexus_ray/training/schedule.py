"""Schedules: pure functions of the step, so that a resumed run continues exactly."""

from __future__ import annotations

import math

from nexus_ray.config import OptimiserSection, RoutersSection, ScheduleSection


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleSection) -> float:
    """Learning rate of the optimiser step number `step` (0-based) of `steps`.

    Linear warm-up to `peak`, constant, then decay to `floor * peak` by a cosine or a straight line; with the shape
    `constant` there is no decay.
    """
    warmup_steps = schedule.warmup * steps
    decay_steps = schedule.decay * steps
    if step < warmup_steps:
        return peak * min(1.0, (step + 1) / warmup_steps)
    into_decay = step + 1 - (steps - decay_steps)
    if into_decay <= 0 or schedule.shape == "constant":
        return peak
    progress = min(1.0, into_decay / decay_steps)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule.shape == "cosine" else 1 - progress
    return peak * (schedule.floor + (1 - schedule.floor) * remaining)


def biases_are_frozen(step: int, steps: int, routers: RoutersSection) -> bool:
    """Whether router biases stay as they are in this step (0-based) and from then on."""
    return step / steps >= routers.freeze_bias_at


def learning_rates(
    step: int, steps: int, section: OptimiserSection, routers: RoutersSection | None = None
) -> dict[str, float]:
    """Every learning rate of a step (0-based), by the name that it is logged under.

    Args:
        step: number of the optimiser step.
        steps: of the whole run.
        section: the peak and its schedule.
        routers: which routers are trained; those have learning rates of their own.
    """
    rate = learning_rate(step, steps, section.learning_rate, section.schedule)
    rates = {"learning_rate": rate}
    if routers is not None and routers.train == "all":
        rates["router_learning_rate"] = rate * routers.learning_rate_factor
    if routers is not None and routers.train != "none":
        frozen = biases_are_frozen(step, steps, routers)
        rates["router_bias_learning_rate"] = 0.0 if frozen else rate * routers.bias_learning_rate_factor
    return rates
