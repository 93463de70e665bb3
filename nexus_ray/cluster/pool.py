"""Mapping work over a pool of actors.

All stages that pass over text use `map_over_pool`: Ray Data streams the work items to an actor pool and results
come back as they finish, under one progress bar.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from nexus_ray import worker_log
from nexus_ray.cluster.deaths import OUT_OF_MEMORY_HINT
from nexus_ray.cluster.nodes import needs
from nexus_ray.cluster.patience import patience
from nexus_ray.cluster.placement import find_place
from nexus_ray.cluster.requests import actor_options
from nexus_ray.cluster.session import begin_as_worker
from nexus_ray.config import ResourcesSection
from nexus_ray.console import progress
from nexus_ray.errors import NexusError, error_from_record, error_to_record
from nexus_ray.heartbeat import doing
from nexus_ray.observing.pools import PoolWatch, WatchedWorker
from nexus_ray.versions import driver_versions

logger = logging.getLogger(__name__)
_TRIES = 4  # workers that may die, for each that is wanted, before another piece of work is finished
_STRATEGIES = {"PACK": "DEFAULT", "SPREAD": "SPREAD"}  # Ray's names of them, where there is no placement group
_TASKS_IN_FLIGHT = 2  # one at work and one waiting: more would leave workers idle at the end


def map_over_pool(
    worker: type[Callable[[dict[str, Any]], dict[str, Any]]],
    arguments: dict[str, Any],
    items: Sequence[dict[str, Any]],
    resources: ResourcesSection,
    description: str,
    amount: tuple[str, int] | None = None,
    expected: str = "",
) -> Iterator[dict[str, Any]]:
    """Run `worker(**arguments)(item)` for each item on a pool of actors; yield results in completion order.

    Args:
        worker: class of a callable that takes a row and returns a row.
        arguments: its constructor's arguments, the same for each actor.
        items: rows, one call each.
        resources: how many actors and what each of them gets.
        description: label of the progress bar.
        amount: what progress counts, as a column of the returned rows and its sum over all of them; default: items.
        expected: column of the returned rows with what was expected of an item, where the sum is of expectations.
    """
    if not items:
        return
    selector = find_place(description, resources)
    import ray

    _quiet_ray_data()
    most = min(resources.workers, len(items))
    pool = ray.data.ActorPoolStrategy(
        min_size=min(resources.min_workers or most, most),
        max_size=most,
        max_tasks_in_flight_per_actor=_TASKS_IN_FLIGHT,
    )
    watch = PoolWatch(description, len(items))
    guarded = {"worker": worker, "arguments": arguments, "stage": description, "driver": driver_versions()}
    with warnings.catch_warnings():
        # Ray has no parameter of its own for retries yet; pyproject.toml keeps it below 2.64, where this way ends.
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        results = ray.data.from_items(list(items), override_num_blocks=len(items)).map(
            WatchedWorker,  # type: ignore[arg-type]
            fn_constructor_kwargs={"make": _Guarded, "arguments": guarded, "labels": watch.labels},
            compute=pool,
            max_task_retries=-1,  # Ray counts each call of a worker whose node is lost but not yet missed: dozens
            **_pool_options(resources, selector),
        )
    unit, total = amount or ("", len(items))
    forecast = Forecast(total)
    worker_log.expect_workers()
    with (
        watch,
        patience(description, resources, 1, selector) as patient,
        progress(description, total, unit, about=bool(expected)) as advance,
        doing(lambda: worker_log.what_workers_do(needs(resources))),
    ):
        patient.may_die(_TRIES * most)
        for number, row in enumerate(_surviving(results.iter_rows(), description), 1):
            patient.may_die(_TRIES * min(most, len(items) - number))
            watch.take(row)
            if row.get("error"):
                raise error_from_record(row)
            steps = int(row[unit]) if unit else 1
            advance(steps, forecast.after(steps, int(row[expected])) if expected else None)
            yield row


def _pool_options(resources: ResourcesSection, selector: dict[str, str]) -> dict[str, Any]:
    """Options of the actors: what each of them gets, and where it may be."""
    options = actor_options(resources)
    if selector:
        options["label_selector"] = selector
    if resources.placement is not None:
        options["scheduling_strategy"] = _STRATEGIES[resources.placement]
    return options


class Forecast:
    """A total that is a sum of expectations until the last one is met: it follows what the first ones turned out to be.

    Args:
        expected: of all items together.
    """

    def __init__(self, expected: int) -> None:
        self._left = expected
        self._met = self._done = 0

    def after(self, steps: int, expected: int) -> int:
        """The total to expect after an item of `steps` steps, of which `expected` were expected; exact at the end."""
        self._done += steps
        self._met += expected
        self._left -= expected
        ratio = self._done / self._met if self._done else 1.0
        return self._done + round(self._left * ratio)


def _surviving(rows: Iterable[dict[str, Any]], description: str) -> Iterator[dict[str, Any]]:
    """The rows; what Ray cannot make good becomes a message for people."""
    from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

    try:
        yield from rows
    except RayTaskError:  # a defect, with its traceback
        raise
    except (RayActorError, OutOfMemoryError) as error:
        raise NexusError(
            f"{description}: a worker died for good: {_first_line(error)}",
            f"if it was short of memory: {OUT_OF_MEMORY_HINT}; the same command continues",
        ) from error
    except RayError as error:  # objects or nodes that Ray could not bring back
        raise NexusError(f"{description}: Ray failed: {_first_line(error)}", "the same command continues") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


class _Guarded:
    """Runs a worker; an error that a user can cause comes back as data and is raised again in the driver."""

    def __init__(
        self,
        worker: Callable[..., Callable[[dict[str, Any]], dict[str, Any]]],
        arguments: dict[str, Any],
        stage: str,
        driver: dict[str, str],
    ) -> None:
        self._failure: NexusError | None = None
        try:
            begin_as_worker(stage, driver)
            self._worker = worker(**arguments)
            worker_log.ready()
        except NexusError as error:
            self._failure = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._failure is not None:
            return error_to_record(self._failure)
        try:
            return self._worker(row)
        except NexusError as error:
            return error_to_record(error)


def _quiet_ray_data() -> None:
    """Leave the screen to our own progress bar."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Its errors reach us as exceptions, and `_surviving` puts them into words.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
