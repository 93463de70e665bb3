"""One command at a time in a run directory: a lock of the file system, or a lease in an object store."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nexus_ray.errors import NexusError
from nexus_ray.interrupting import interrupt_main_thread
from nexus_ray.layout import RunLayout
from nexus_ray.storage import is_remote, make_directory, read_text, remove, storage_error, write_json
from nexus_ray.storage.lease import HeldError, Lease

LOCK = ".lock"
_HOLDER = ".lock.json"
_ELSEWHERE = "wait for it to end, or choose another place with run.directory=PATH"


class RunLock:
    """A run directory that this process holds."""

    def __init__(self, lease: Lease | None = None) -> None:
        self._lease = lease

    def check(self) -> None:
        """Make sure that it is still held, before something is written that another command must not find.

        Raises:
            StorageError: it is not: another command has taken it over.
        """
        if self._lease is not None:
            self._lease.check()


@contextmanager
def locked(layout: RunLayout) -> Iterator[RunLock]:
    """Hold the run directory: two commands must not work in it at the same time.

    Raises:
        NexusError: another process holds it; says which.
        StorageError: the lock was lost while the block ran.
    """
    if is_remote(layout.directory):
        with _leased(Lease(layout.directory / LOCK, this_process()), layout) as lock:
            yield lock
    else:
        with _file_locked(make_directory(layout.directory)):
            yield RunLock()


def this_process() -> dict[str, Any]:
    """What another command is told of this one; `since` is for people, nothing is decided by it."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": _submission(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _submission() -> str | None:
    """Id of the Ray job that runs this process."""
    try:
        job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
        return job.get("metadata", {}).get("job_submission_id")
    except (ValueError, AttributeError):
        return None


@contextmanager
def _leased(lease: Lease, layout: RunLayout) -> Iterator[RunLock]:
    try:
        lease.acquire()
    except HeldError as error:
        raise _held(layout, error.holder) from None
    lease.keep(interrupt_main_thread if threading.current_thread() is threading.main_thread() else lambda: None)
    try:
        yield RunLock(lease)
    except KeyboardInterrupt:
        if lease.lost:
            lease.check()  # says what has happened
        raise
    finally:
        lease.release()


@contextmanager
def _file_locked(directory: Path) -> Iterator[None]:
    holder = directory / _HOLDER
    try:
        lock = FileLock(directory / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise _held(RunLayout(directory), _read(holder)) from error
    except OSError as error:  # another user's, or a file system that may only be read
        raise storage_error(error, directory / LOCK) from error
    try:
        write_json(holder, this_process())
        yield
    finally:
        remove(holder)
        lock.release()


def _read(holder: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(holder))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _held(layout: RunLayout, holder: dict[str, Any]) -> NexusError:
    who = f"process {holder.get('pid')} on {holder.get('host')}"
    job = f", Ray job {holder['job']}" if holder.get("job") else ""
    since = f", since {holder.get('since')}"
    return NexusError(
        f"another nexus-ray is working in {layout.directory}{f': {who}{job}{since}' if holder else ''}", _ELSEWHERE
    )
