"""What a training says when it cannot go on: what was seen, what to do, and where the last good weights are."""

from __future__ import annotations

from collections.abc import Sequence

from nexus_ray.errors import NexusError
from nexus_ray.training.guards import Progress
from nexus_ray.training.recovery import newest
from nexus_ray.training.settings import LoopSettings

_MOST_SKIPPED = 10  # steps in a row without a finite gradient: more is no accident


def not_finite(step: int, norm: float, loss: float, names: Sequence[str]) -> str:
    """What was seen in a step whose loss or gradient is NaN or infinite, with the sequences it came from."""
    where = f"sequences {', '.join(names)}" if names else "no single sequence: the sum of their gradients"
    return f"step {step}: the loss is {loss} and the gradient norm {norm}; it comes from {where}"


def raise_if_not_to_be_skipped(what: str, settings: LoopSettings, progress: Progress) -> None:
    """Stop at such a step as configured, and at too many of them in a row.

    Raises:
        NexusError: it is not to be skipped.
    """
    if settings.on_nan == "stop":
        raise NexusError(
            f"{what}; nothing was updated",
            "look at these sequences; train.on_nan=skip passes over such steps; or lower "
            f"train.optimiser.learning_rate (now {settings.optimiser.learning_rate:g}). "
            f"{_last_good(settings, progress)}",
        )
    if progress.skipped >= _MOST_SKIPPED:
        before = _MOST_SKIPPED - 1
        raise NexusError(f"{what}, as in the {before} steps before it", _start_over(settings, progress))


def diverging(step: int, loss: float, settings: LoopSettings, progress: Progress) -> NexusError:
    """The error for a loss that has run away."""
    return NexusError(
        f"step {step}: the training diverges: the loss of the last steps is around {loss:.2f} nats, "
        f"it was {progress.lowest:.2f}",
        _start_over(settings, progress),
    )


def _start_over(settings: LoopSettings, progress: Progress) -> str:
    rate = settings.optimiser.learning_rate
    return (
        f"lower train.optimiser.learning_rate (now {rate:g}) and start over in another run.directory, or here with "
        f"--force, which removes this attempt. {_last_good(settings, progress)}"
    )


def _last_good(settings: LoopSettings, progress: Progress) -> str:
    if progress.best is not None:
        return f"The best weights so far, after {progress.best_step} steps, are in {settings.layout.best}"
    found = newest(settings.layout.checkpoints)
    return f"The last checkpoint is {found}" if found else "There is no checkpoint yet"
