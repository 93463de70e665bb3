"""Connecting to a cluster, or starting Ray on this machine."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

logger = logging.getLogger(__name__)


def ensure_ray() -> None:
    """Connect to the cluster that RAY_ADDRESS names (a submitted job has it), else start Ray here.

    Ray's CPUs are logical: at least four, so that a two-worker stage and its coordinator fit a two-core laptop.
    """
    # Ray's C++ core prints notices to the terminal that no user can act on.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": logger.isEnabledFor(logging.DEBUG),
    }
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", **quiet)
    else:
        logger.info("starting Ray on this machine")
        # "local": without it Ray would join whatever cluster was last started on this machine.
        ray.init(address="local", num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False, **quiet)
    _stop_as_on_ctrl_c()


def on_cluster() -> bool:
    """Whether work goes to a cluster; else Ray, where it is needed at all, is started on this machine for this job."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _stop_as_on_ctrl_c() -> None:
    """Let SIGTERM, which stopped jobs get, do what Ctrl-C does; Ray would end the process at once."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)


def _stop(*_: object) -> None:
    """Do what Ctrl-C does, also where it is ignored: shell scripts start what they end with `&` like that."""
    if callable(signal.getsignal(signal.SIGINT)):
        signal.raise_signal(signal.SIGINT)
    else:
        raise KeyboardInterrupt
