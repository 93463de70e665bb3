"""Told to stop, a training writes a checkpoint first, if it can in the time that it has.

The driver is told (SIGTERM: `ray job stop`, a service manager) and the first worker writes; a file in Ray Train's
directory carries the request and its disappearance is the answer.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from nexus_ray import worker_log
from nexus_ray.cluster import stop
from nexus_ray.storage import Place

logger = logging.getLogger(__name__)
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the command of a submitted job
_JOB_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
_JOB_STOP_WAIT_DEFAULT = 3.0  # Ray's
_SECONDS_ELSEWHERE = 20.0
_SECONDS_TO_END = 10.0  # Ray Train's workers, the lock, the process itself
_LOOK_EVERY_SECONDS = 1.0


def seconds_for_checkpoint() -> float:
    """How long a driver that is told to stop may wait for a checkpoint, before it is killed."""
    if _JOB not in os.environ:
        return _SECONDS_ELSEWHERE
    whole = float(os.environ.get(_JOB_STOP_WAIT, _JOB_STOP_WAIT_DEFAULT))
    return max(whole - _SECONDS_TO_END, whole / 3)


class StopRequest:
    """The driver's request to the first worker.

    Args:
        directory: of Ray Train's state.
    """

    def __init__(self, directory: Place) -> None:
        self._file = directory / "stop"
        self._looked = 0.0

    def is_there(self) -> bool:
        """Whether the driver has asked; looks once a second at most, for it may be an object store that is asked."""
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_SECONDS:
            return False
        self._looked = now
        return self._file.exists()

    def answer(self) -> None:
        """Say that a checkpoint has been written."""
        self._file.unlink(missing_ok=True)

    def ask(self, seconds: float) -> bool:
        """Ask, and wait for the answer; whether there was one in time."""
        deadline = time.monotonic() + seconds
        self._file.write_text("write a checkpoint\n", encoding="utf-8")
        while self._file.exists():
            if time.monotonic() >= deadline:
                self.answer()
                return False
            time.sleep(0.05)
        return True


@contextmanager
def checkpoint_before_stopping(directory: Place) -> Iterator[None]:
    """Within the block SIGTERM asks the workers for a checkpoint before it does what it would do; twice: at once."""
    request = StopRequest(directory)
    request.answer()  # what a driver has asked that was killed
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def told_to_stop(*_: object) -> None:
        nonlocal asked
        if not asked and worker_log.are_ready():
            asked = True
            with suppress(OSError):  # no place for the request: none for a checkpoint either
                _ask(request)
        stop()

    before = signal.signal(signal.SIGTERM, told_to_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ask(request: StopRequest) -> None:
    seconds = seconds_for_checkpoint()
    logger.info("told to stop: a checkpoint is written first, if that takes no longer than %.0f s", seconds)
    if request.ask(seconds):
        logger.info("the checkpoint is written")
    else:
        logger.warning("no checkpoint in time: the training will go on from the one before")
