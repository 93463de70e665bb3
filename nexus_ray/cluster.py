"""Ray: connecting or starting it, and mapping work over a pool of actors.

All stages that pass over text use `map_over_pool`: Ray Data streams the work items to an actor pool and results
come back as they finish, under one progress bar.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from nexus_ray import worker_log
from nexus_ray.config import ResourcesSection
from nexus_ray.console import progress
from nexus_ray.errors import NexusError, error_from_record, error_to_record
from nexus_ray.heartbeat import doing
from nexus_ray.nodes import OUT_OF_MEMORY_HINT, as_resources
from nexus_ray.observing.command import record_signal
from nexus_ray.observing.links import tell_ray
from nexus_ray.observing.pools import PoolWatch, WatchedWorker
from nexus_ray.patience import patience
from nexus_ray.versions import driver_versions, require_same

logger = logging.getLogger(__name__)
_TRIES = 4  # workers that may die, for each that is wanted, before another piece of work is finished
_ANSWER_SECONDS = 10.0  # for a cluster to take a connection
_TASKS_IN_FLIGHT = 2  # one at work and one waiting: more would leave workers idle at the end


def ensure_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names (a submitted job has it), else start Ray here.

    Ray's CPUs are logical: at least four, so that a two-worker stage and its coordinator fit a two-core laptop.
    """
    # Ray's C++ core prints notices to the terminal that no user can act on.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        context = _connect(address, quiet)
    else:
        logger.info("starting Ray on this machine")
        # "local": without it Ray would join whatever cluster was last started on this machine.
        context = ray.init(address="local", num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False, **quiet)
    worker_log.listen(everything=logger.isEnabledFor(logging.DEBUG))
    stop_as_on_ctrl_c()
    tell_ray(context)


def _connect(address: str, options: dict[str, Any]) -> Any:
    """Join a cluster that runs already.

    Raises:
        NexusError: there is none, or it has another Python or Ray.
    """
    import ray

    nobody = NexusError(
        f"no Ray cluster answers at RAY_ADDRESS={address}",
        "start it or correct the address; without RAY_ADDRESS Ray is started on this machine",
    )
    if _is_deaf(address):
        raise nobody
    try:
        return ray.init(address="auto", **options)
    except ConnectionError as error:
        raise nobody from error
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise NexusError(
            f"the cluster at RAY_ADDRESS={address} does not fit this process. {error}",
            "install the same Python and Ray in both; or let the cluster's own run it: `ray job submit --working-dir . "
            "-- python jobs/pipeline.py CONFIG`",
        ) from error


def _is_deaf(address: str) -> bool:
    """Whether it is a host and port where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return False
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError:
        return True
    return False


def stop_as_on_ctrl_c() -> None:
    """Let SIGTERM, which stopped jobs get, do what Ctrl-C does; Ray would end the process at once."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def stop(number: int = signal.SIGINT, *_: object) -> None:
    """Do what Ctrl-C does, also where it is ignored: shell scripts start what they end with `&` like that."""
    record_signal(number)
    if callable(signal.getsignal(signal.SIGINT)):
        signal.raise_signal(signal.SIGINT)
    else:
        raise KeyboardInterrupt


def actor_options(resources: ResourcesSection) -> dict[str, Any]:
    """Ray's resource request for one worker."""
    options: dict[str, Any] = {"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker}
    if resources.memory_gib_per_worker is not None:
        options["memory"] = int(resources.memory_gib_per_worker * 2**30)
    return options


def needs(resources: ResourcesSection) -> str:
    """What a worker needs beside what is free in the cluster, in words."""
    import ray

    request = actor_options(resources)
    wanted = {"CPU": request["num_cpus"], "GPU": request["num_gpus"]}
    wanted = {name: count for name, count in wanted.items() if count}
    free, nodes = ray.available_resources(), sum(node["Alive"] for node in ray.nodes())
    there = ", ".join(f"{name} {free.get(name, 0):g}" for name in wanted)
    each = ", ".join(f"{name} {count:g}" for name, count in wanted.items())
    return f"each needs {each}; free on {nodes} node{'' if nodes == 1 else 's'}: {there}"


def begin_as_worker(stage: str, driver: dict[str, str]) -> None:
    """What every worker does first: speak to the driver, and see whether it runs the same code and versions.

    Raises:
        NexusError: it does not.
    """
    import ray

    worker_log.speak_as(stage)
    require_same(driver, ray.util.get_node_ip_address())


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
    ensure_ray()
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
            **actor_options(resources),
        )
    unit, total = amount or ("", len(items))
    forecast = Forecast(total)
    worker_log.expect_workers()
    with (
        watch,
        patience(description, as_resources(actor_options(resources)), 1, resources.max_wait_minutes) as patient,
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


def set_worker_threads(resources: ResourcesSection) -> None:
    """Give torch as many threads as the worker has CPUs: results must not depend on the machine's core count."""
    import torch

    torch.set_num_threads(resources.cpus_per_worker)
