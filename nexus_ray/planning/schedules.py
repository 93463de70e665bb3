"""What changes during a training, step by step, from the functions that training itself uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_ray.config import LOSSES, Config, Scheduled, TrainSection
from nexus_ray.training.schedule import biases_are_frozen, learning_rates


@dataclass(frozen=True)
class Schedules:
    """Values of every step of a run.

    Attributes:
        steps: optimiser steps.
        rates: [steps] learning rates, by the name that metrics have.
        temperatures: [steps] those of losses that there are, by loss.
        weights: [steps] weights that change, by "SOURCE, loss".
        merges: finished steps after which the weights are merged with an anchor.
        frozen_at: finished steps after which router biases stay as they are; None when they never do.
    """

    steps: int
    rates: Mapping[str, NDArray[np.float64]]
    temperatures: Mapping[str, NDArray[np.float64]]
    weights: Mapping[str, NDArray[np.float64]]
    merges: tuple[int, ...]
    frozen_at: int | None

    def rows(self) -> dict[str, NDArray[np.float64]]:
        """Everything by a name for people."""
        temperatures = {f"{loss} temperature": values for loss, values in self.temperatures.items()}
        weights = {f"weight of {name}": values for name, values in self.weights.items()}
        return {name.replace("_", " "): values for name, values in self.rates.items()} | temperatures | weights

    def as_dict(self) -> dict[str, Any]:
        """First, largest and last value of each row, merges and the freeze, as JSON-serialisable data."""
        rows = {name: {"first": row[0], "largest": row.max(), "last": row[-1]} for name, row in self.rows().items()}
        return {"steps": self.steps, "values": rows, "merges": list(self.merges), "frozen_at": self.frozen_at}


def make_schedules(config: Config) -> Schedules:
    """Every schedule of a run, evaluated at every step; the share of the run at step s is s / steps."""
    train = config.train
    used = {loss for section in train.sources.values() for loss in LOSSES if getattr(section, loss)}
    temperatures = {"output_kl": train.output_temperature, "router_kl": train.router_temperature}
    every = train.averaging.every
    return Schedules(
        steps=train.steps,
        rates=_rates(train),
        temperatures={loss: _values(value, train.steps) for loss, value in temperatures.items() if loss in used},
        weights=_changing_weights(train),
        merges=tuple(range(every, train.steps + 1, every)) if every else (),
        frozen_at=_frozen_at(train),
    )


def _rates(train: TrainSection) -> dict[str, NDArray[np.float64]]:
    each = [learning_rates(step, train.steps, train.optimiser, train.routers) for step in range(train.steps)]
    return {name: np.asarray([rates[name] for rates in each]) for name in each[0]}


def _changing_weights(train: TrainSection) -> dict[str, NDArray[np.float64]]:
    weights = {f"{name}, {loss}": getattr(section, loss) for name, section in train.sources.items() for loss in LOSSES}
    return {name: _values(weight, train.steps) for name, weight in weights.items() if weight.constant is None}


def _values(scheduled: Scheduled, steps: int) -> NDArray[np.float64]:
    return np.asarray([scheduled.at(step / steps) for step in range(steps)])


def _frozen_at(train: TrainSection) -> int | None:
    if train.routers.train == "none":
        return None
    return next((step for step in range(train.steps) if biases_are_frozen(step, train.steps, train.routers)), None)
