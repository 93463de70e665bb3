"""Heavy steps that are no pool: on a cluster they run on a worker node, not in the driver, which is on the head.

What is logged and printed there is seen here, an error that a user can cause is raised here, and Ctrl-C ends it there.
"""

from __future__ import annotations

import io
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from logging.handlers import QueueHandler
from typing import Any, ParamSpec, TypeVar, cast

from nexus_ray.cluster.patience import patience
from nexus_ray.cluster.placement import find_place
from nexus_ray.cluster.requests import actor_options
from nexus_ray.cluster.session import on_cluster
from nexus_ray.config import ResourcesSection
from nexus_ray.errors import NexusError, error_from_record, error_to_record
from nexus_ray.versions import driver_versions, require_same

P = ParamSpec("P")
T = TypeVar("T")
logger = logging.getLogger(__name__)
_PACKAGE = "nexus_ray"
_RETRIES = 3  # of a step whose worker died: it writes its artefact as a whole or not at all


def run_on_worker(
    what: str, resources: ResourcesSection, function: Callable[P, T], *arguments: P.args, **named: P.kwargs
) -> T:
    """`function(*arguments, **named)`: on a worker node of the cluster, or here where there is no cluster.

    Args:
        what: it does, for messages.
        resources: of the one worker.
        function: importable by its name; what it takes and returns must be what Ray can send.
        arguments: its arguments.
        named: those by name.

    Raises:
        NexusError: as the function; or there is no place for it.
    """
    if not on_cluster():
        return function(*arguments, **named)
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    for attempt in range(_RETRIES + 1):
        try:
            return cast(T, _run_there(what, resources, function, arguments, named))
        except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
            if attempt == _RETRIES:
                raise NexusError(
                    f"{what}: its worker died {_RETRIES + 1} times, killed or out of memory",
                    "resources.memory_gib_per_worker reserves memory for it; the same command does this step again",
                ) from error
            logger.warning("%s: its worker died (%s); it begins again", what, type(error).__name__)
    raise AssertionError("the last attempt returns or raises")


def _run_there(
    what: str,
    resources: ResourcesSection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    named: dict[str, Any],
) -> Any:
    """One attempt."""
    selector = find_place(what, resources)
    import ray

    options = actor_options(resources) | ({"label_selector": selector} if selector else {})
    task = ray.remote(_stream).options(num_returns="streaming", max_retries=0, **options)
    stream: Any = task.remote(logging.getLogger(_PACKAGE).level, driver_versions(), function, arguments, named)
    with patience(what, resources, 1, selector):
        try:
            return _result(map(ray.get, stream))
        except KeyboardInterrupt:
            ray.cancel(stream, force=True)
            raise


def _result(told: Iterable[tuple[str, Any]]) -> Any:
    """The result, when all before it was shown here; raises the error."""
    for kind, value in told:
        if kind == "log":
            logging.getLogger(value.name).handle(value)
        elif kind == "print":
            print(value, end="", flush=True)
        elif kind == "error":
            raise error_from_record(value)
        else:
            return value
    raise AssertionError("the stream ends with a result")


def _stream(
    level: int,
    driver: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    named: dict[str, Any],
) -> Iterator[tuple[str, Any]]:
    """The task: what is logged and printed as it comes, then the result or the error."""
    import ray

    said: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    package = logging.getLogger(_PACKAGE)
    package.handlers, package.propagate = [_Forwarding(said)], False
    package.setLevel(level)
    defect: list[BaseException] = []

    def work() -> None:
        try:
            require_same(driver, ray.util.get_node_ip_address())
            with redirect_stdout(_Printed(said)):
                said.put(("result", function(*arguments, **named)))
        except NexusError as error:
            said.put(("error", error_to_record(error)))
        except BaseException as error:
            defect.append(error)
            said.put(("defect", None))

    threading.Thread(target=work, daemon=True, name="work").start()
    while True:
        kind, value = said.get()
        if kind == "defect":
            raise defect[0]
        yield kind, value
        if kind in ("result", "error"):
            return


class _Forwarding(QueueHandler):
    """Puts records, as plain text, where the task takes them from."""

    def __init__(self, said: queue.SimpleQueue[tuple[str, Any]]) -> None:
        super().__init__(said)
        self._said = said

    def enqueue(self, record: logging.LogRecord) -> None:
        """Take a record that `prepare` has made fit to be sent."""
        self._said.put(("log", record))


class _Printed(io.TextIOBase):
    """A standard output that puts what is printed where the task takes it from."""

    def __init__(self, said: queue.SimpleQueue[tuple[str, Any]]) -> None:
        self._said = said

    def write(self, text: str) -> int:
        """Take some text."""
        self._said.put(("print", text))
        return len(text)
