"""What keeps a stage from getting faster with more workers: the driver's own work, and notes for people."""

from __future__ import annotations

from nexus_ray.planning.scale import figures
from nexus_ray.planning.scale.costs import TimePart
from nexus_ray.planning.scale.run import PlannedRun


def driver_parts(run: PlannedRun, passes: int) -> tuple[TimePart, ...]:
    """What the driver does with the text before a pool starts; local text is hashed, a store names its own checksum."""
    return (
        TimePart("text hashed", passes * run.text_bytes / figures.HASH, held=False),
        TimePart("shards listed", run.shards * figures.LIST_SHARD, held=False),
    )


def few_units(units: int, workers: int, what: str) -> tuple[str, ...]:
    """A note where there is not enough work to go round."""
    if units >= workers:
        return ()
    return (f"{units:,} {what} give work to {units:,} of {workers:,} workers",)


def bound_note(run: PlannedRun, bound: str) -> tuple[str, ...]:
    """Why more speed is not to be had from the GPU."""
    if not run.on_gpu or bound == "products":
        return ()
    why = "launching kernels" if bound == "launches" else "unpacking experts"
    return (f"most of a batch's time goes into {why}: a batch of more sequences takes little longer",)
