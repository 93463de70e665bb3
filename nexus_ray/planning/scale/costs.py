"""The vocabulary of the scale model: what a stage costs, and in which parts its time goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_HOUR = 3600


@dataclass(frozen=True)
class TimePart:
    """Seconds of one purpose.

    Attributes:
        name: what for.
        seconds: how long.
        scales: whether more workers make it shorter.
        held: whether the stage's GPUs are held meanwhile.
    """

    name: str
    seconds: float
    scales: bool = False
    held: bool = True


@dataclass(frozen=True)
class StageCost:
    """What a stage takes.

    Attributes:
        stage: its verb, or what comes before and after the stages.
        parts: where the time goes, in order.
        workers: that have work.
        gpus: held while parts say so.
        moved: bytes over the network or to storage.
        notes: what limits it, in words.
    """

    stage: str
    parts: tuple[TimePart, ...]
    workers: int = 1
    gpus: float = 0.0
    moved: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """From beginning to end."""
        return sum(part.seconds for part in self.parts)

    @property
    def fixed_seconds(self) -> float:
        """What no number of workers makes shorter (Amdahl)."""
        return sum(part.seconds for part in self.parts if not part.scales)

    @property
    def gpu_hours(self) -> float:
        """GPUs times the hours for which they are held."""
        return sum(part.seconds for part in self.parts if part.held) * self.gpus / _HOUR

    def money(self, price: float) -> float:
        """At a price of one GPU for one hour."""
        return self.gpu_hours * price

    def as_dict(self, price: float | None) -> dict[str, Any]:
        """As JSON-serialisable data."""
        return {
            "seconds": self.seconds,
            "fixed_seconds": self.fixed_seconds,
            "parts": {part.name: part.seconds for part in self.parts},
            "workers": self.workers,
            "gpus": self.gpus,
            "gpu_hours": self.gpu_hours,
            "cost": None if price is None else self.money(price),
            "moved_bytes": self.moved,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class RunCost:
    """All stages, one after the other.

    Attributes:
        stages: in order.
        price: of one GPU for one hour; None where none is known.
        assumed: what the times rest on, in words.
    """

    stages: tuple[StageCost, ...]
    price: float | None
    assumed: str

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        """Of all stages."""
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def money(self) -> float | None:
        """Of all stages, at `price`."""
        return None if self.price is None else self.gpu_hours * self.price

    def as_dict(self) -> dict[str, Any]:
        """As JSON-serialisable data."""
        return {
            "stages": {stage.stage: stage.as_dict(self.price) for stage in self.stages},
            "seconds": self.seconds,
            "gpu_hours": self.gpu_hours,
            "price_per_gpu_hour": self.price,
            "cost": self.money,
            "assumed": self.assumed,
        }
