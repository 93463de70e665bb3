"""Connecting to a cluster, or starting Ray on this machine; and what a worker does first."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from typing import Any

from nexus_ray import worker_log
from nexus_ray.errors import NexusError
from nexus_ray.observing.command import record_signal
from nexus_ray.observing.links import tell_ray
from nexus_ray.versions import require_same

logger = logging.getLogger(__name__)
_ANSWER_SECONDS = 10.0  # for a cluster to take a connection


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
    context = _connect(address, quiet) if address else _start(quiet)
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


def _start(options: dict[str, Any]) -> Any:
    """Start Ray here.

    Raises:
        NexusError: it did not start.
    """
    import ray

    logger.info("starting Ray on this machine")
    try:
        # "local": without it Ray would join whatever cluster was last started on this machine.
        return ray.init(address="local", num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False, **options)
    except Exception as error:  # Ray has no class of its own for what its processes could not do
        raise NexusError(
            f"Ray has not started on this machine: {str(error).strip().partition(chr(10))[0]}",
            "its processes have 30 seconds, memory and space in /tmp; their logs are in /tmp/ray/session_latest/logs. "
            "When the machine has less to do, the same command continues",
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


def on_cluster() -> bool:
    """Whether work goes to a cluster; else Ray, where it is needed at all, is started on this machine for this job."""
    return bool(os.environ.get("RAY_ADDRESS"))


def begin_as_worker(stage: str, driver: dict[str, str]) -> None:
    """What every worker does first: speak to the driver, and see whether it runs the same code and versions.

    Raises:
        NexusError: it does not.
    """
    import ray

    worker_log.speak_as(stage)
    require_same(driver, ray.util.get_node_ip_address())
