"""What a training says when it cannot go on: what was seen, what to do, and where the last good weights are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nexus_ray.errors import ArtefactError, NexusError, StorageError
from nexus_ray.training.guards import Progress
from nexus_ray.training.local import local_only
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
        skip = "train.on_nan=skip passes over such steps; or " if settings.section == "train" else ""
        raise NexusError(
            f"{what}; nothing was updated",
            f"look at these sequences; {skip}lower {_rate(settings)}. {_last_good(settings, progress)}",
        )
    if progress.skipped >= _MOST_SKIPPED:
        before = _MOST_SKIPPED - 1
        raise NexusError(f"{what}, as in the {before} steps before it", _start_over(settings, progress))


def validation_not_finite(
    step: int, record: Mapping[str, Any], settings: LoopSettings, progress: Progress
) -> dict[str, Any]:
    """The warning about a validation loss that is NaN or infinite, where such things are passed over.

    Raises:
        NexusError: they are not.
    """
    names = [name for name, loss in record.get("losses", {}).items() if not math.isfinite(loss)]
    what = f"the validation loss is {record['loss']}{': ' if names else ''}{', '.join(names)}"
    if settings.on_nan == "stop":
        skip = ", or set train.on_nan=skip" if settings.section == "train" else ""
        raise NexusError(
            f"step {step}: {what}",
            f"look at that text; lower {_rate(settings)}{skip}. {_last_good(settings, progress)}",
        )
    return {
        "kind": "validation",
        "message": f"{what}; these weights are not taken for the best",
        "hint": f"look at that text; lower {_rate(settings)}",
    }


def nothing_whole(damaged: Sequence[str], settings: LoopSettings) -> ArtefactError:
    """The error for checkpoints of which none can be continued."""
    return ArtefactError(
        f"no checkpoint of this training is whole: {'; '.join(damaged)}",
        f"put one back from a copy; or start over in another run.directory{_here(settings)}",
    )


def damaged_checkpoint(reason: str, progress: Progress) -> dict[str, str]:
    """The warning that a checkpoint was passed over."""
    return {
        "kind": "checkpoint",
        "message": f"{reason}; training goes on from step {progress.step}",
        "hint": "what was lost is done again; look after the disk, and keep more with keep_checkpoints",
    }


def diverging(step: int, what: str, loss: float, settings: LoopSettings, progress: Progress) -> NexusError:
    """The error for a loss that has run away."""
    lowest = progress.lowest if progress.judged_by_steps else progress.best
    return NexusError(
        f"step {step}: the training diverges: {what} is around {loss:.2f} nats, it was {lowest:.2f}",
        _start_over(settings, progress),
    )


def _start_over(settings: LoopSettings, progress: Progress) -> str:
    return (
        f"lower {_rate(settings)} and start over in another run.directory{_here(settings)}. "
        f"{_last_good(settings, progress)}"
    )


def _rate(settings: LoopSettings) -> str:
    return f"{settings.section}.optimiser.learning_rate (now {settings.optimiser.learning_rate:g})"


def _here(settings: LoopSettings) -> str:
    """How to start over in the same place, where a command does that."""
    how = ", or here with `nexus-ray train CONFIG --force`, which removes this attempt"
    return how if settings.section == "train" else ""


def _last_good(settings: LoopSettings, progress: Progress) -> str:
    if progress.best is not None:
        return f"The best weights so far, after {progress.best_step} steps, are in {settings.layout.best}"
    try:
        found, _ = newest(local_only(settings.layout.checkpoints))
    except StorageError:
        return f"Checkpoints are in {settings.layout.checkpoints}"
    return f"The last checkpoint is {found}" if found else "There is no checkpoint yet"
