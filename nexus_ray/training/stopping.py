"""Told to stop, a training writes a checkpoint first, if it can in the time that it has.

The driver is told (SIGTERM: `ray job stop`, a service manager) and the first worker writes.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nexus_ray import worker_log
from nexus_ray.cluster import stop
from nexus_ray.training.messages import Messages

logger = logging.getLogger(__name__)
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the command of a submitted job
_JOB_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
_JOB_STOP_WAIT_DEFAULT = 3.0  # Ray's
_SECONDS_ELSEWHERE = 20.0
_SECONDS_TO_END = 10.0  # Ray Train's workers, the lock, the process itself
_SECONDS_TO_TAKE_BACK = 1.0
_LOOK_EVERY_SECONDS = 0.05


def seconds_for_checkpoint() -> float:
    """How long a driver that is told to stop may wait for a checkpoint, before it is killed."""
    if _JOB not in os.environ:
        return _SECONDS_ELSEWHERE
    whole = float(os.environ.get(_JOB_STOP_WAIT, _JOB_STOP_WAIT_DEFAULT))
    return max(whole - _SECONDS_TO_END, whole / 3)


def wait_for_checkpoint(messages: Messages, seconds: float) -> bool:
    """Ask the workers for a checkpoint and wait for it; whether it was written in time."""
    deadline = time.monotonic() + seconds
    messages.want_checkpoint(True, seconds)
    while (wanted := messages.is_checkpoint_wanted(max(0.0, deadline - time.monotonic()))) is not False:
        if wanted is None or time.monotonic() >= deadline:
            messages.want_checkpoint(False, _SECONDS_TO_TAKE_BACK)
            return False
        time.sleep(_LOOK_EVERY_SECONDS)
    return True


@contextmanager
def checkpoint_before_stopping(messages: Messages) -> Iterator[None]:
    """Within the block SIGTERM asks the workers for a checkpoint before it does what it would do; twice: at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def told_to_stop(number: int, *_: object) -> None:
        nonlocal asked
        if not asked and worker_log.are_ready():
            asked = True
            # A thread of its own: this one may be in the middle of a question to Ray.
            asking = threading.Thread(target=_ask, args=(messages,), daemon=True)
            asking.start()
            asking.join()
        stop(number)

    before = signal.signal(signal.SIGTERM, told_to_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ask(messages: Messages) -> None:
    seconds = seconds_for_checkpoint()
    logger.info("told to stop: a checkpoint is written first, if that takes no longer than %.0f s", seconds)
    if wait_for_checkpoint(messages, seconds):
        logger.info("the checkpoint is written")
    else:
        logger.warning("no checkpoint in time: the training will go on from the one before")
