"""Which runs are still to be done: a learning rate is searched for each method, then come its seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from _comparison.methods import Method
from _comparison.settings import TUNING_SEED
from _comparison.training import Run

LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def next_rates(start: float, found: Mapping[float, float]) -> list[float]:
    """Learning rates to try next: the start and its neighbours, then further while the best is at an end.

    Args:
        start: a rung of `LADDER`.
        found: objective by learning rate; infinite where training diverged.

    Returns:
        rates without a result; none when the best has a result on both sides, or there is no rung left.
    """
    first = LADDER.index(start)
    wanted = LADDER[max(0, first - 1) : first + 2]
    missing = [rate for rate in wanted if rate not in found]
    if missing:
        return missing
    place = LADDER.index(best_rate(found))
    return [rate for rate in LADDER[max(0, place - 1) : place + 2] if rate not in found]


def best_rate(found: Mapping[float, float]) -> float:
    """The learning rate with the lowest objective; of equal ones the smallest."""
    return min(sorted(found), key=lambda rate: found[rate])


def next_runs(method: Method, tuned: Mapping[float, float], seeds: int, *, search: bool = True) -> list[Run]:
    """Runs of a method that can be started now.

    Args:
        method: whose.
        tuned: objective on validation text by learning rate; infinite where training diverged.
        seeds: runs at the best learning rate, with seeds from 0 on.
        search: look further where the best is at an end of those tried.
    """
    rates = next_rates(method.learning_rate, tuned)
    if rates and (search or any(rate not in tuned for rate in _first(method.learning_rate))):
        return [Run(method.name, rate, TUNING_SEED) for rate in rates]
    return [Run(method.name, best_rate(tuned), seed) for seed in range(seeds)]


def _first(start: float) -> Sequence[float]:
    place = LADDER.index(start)
    return LADDER[max(0, place - 1) : place + 2]


def tuned_of(results: Mapping[Run, float | None], method: str) -> dict[float, float]:
    """Objective by learning rate of a method's finished tuning runs."""
    return {
        run.learning_rate: math.inf if value is None else value
        for run, value in results.items()
        if run.method == method and run.is_tuning
    }
