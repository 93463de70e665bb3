"""Room on this node's disk for what is on its way to or from an object store.

Everything is below `cache_root()`: working directories, which end with the block that uses them, and copies of
artefacts, which stay for the next reader while there is room. Locks of the file system say what is in use, so that what
a killed process left is found and removed by the next one.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nexus_ray.errors import StorageError
from nexus_ray.storage.cache_root import cache_root

LIMIT_VARIABLE = "NEXUS_RAY_SCRATCH_GIB"
LIMIT_GIB = 32.0  # that copies of artefacts take before those used least recently make room


class Use:
    """A claim on a directory, by a lock on the file beside it; it ends with `release` or with the process.

    Args:
        directory: what is used; need not exist.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = directory.with_name(f"{directory.name}.lock")
        self._descriptor: int | None = None

    def share(self) -> None:
        """Claim it together with others; waits while one claims it alone."""
        self._acquire(fcntl.LOCK_SH)
        os.utime(self._lock)  # when it was last used

    def claim(self) -> bool:
        """Claim it alone, unless somebody uses it."""
        try:
            self._acquire(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """End the claim."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def remove(self) -> None:
        """Remove what is claimed alone."""
        for path in (self.directory, *_beside(self.directory)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        self._lock.unlink(missing_ok=True)
        self.release()

    def _acquire(self, kind: int) -> None:
        while True:
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, kind)
            except BaseException:
                os.close(descriptor)
                raise
            if _is_same_file(descriptor, self._lock):
                self._descriptor = descriptor
                return
            os.close(descriptor)  # its last user has removed it meanwhile


@contextmanager
def working_directory() -> Iterator[Path]:
    """An empty directory for the length of the block.

    Raises:
        StorageError: this node's disk refused.
    """
    parent = room("working")
    _sweep(parent)
    use = Use(parent / uuid.uuid4().hex[:12])
    try:
        try:
            use.share()
            use.directory.mkdir()
        except OSError as error:
            raise disk_error(error, use.directory) from error
        yield use.directory
    finally:
        use.remove()


def room(name: str) -> Path:
    """A directory below the cache root, made if needed.

    Raises:
        StorageError: this node's disk refused.
    """
    path = cache_root() / name
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error
    return path


def disk_error(error: OSError, path: Path) -> StorageError:
    """What this node's disk has to say about a path in the cache, for people."""
    return StorageError(
        f"cannot write {path}: {error.strerror or error}",
        "free some space, or name a directory on another disk of this node with the environment variable "
        "NEXUS_RAY_CACHE",
    )


def make_way(parent: Path, limit: float | None = None) -> None:
    """Remove the directories of `parent` used least recently, those in use excepted, until it is within the limit.

    Args:
        parent: directory of directories that `Use` claims.
        limit: bytes; default: NEXUS_RAY_SCRATCH_GIB.
    """
    most = float(os.environ.get(LIMIT_VARIABLE) or LIMIT_GIB) * 2**30 if limit is None else limit
    locks = sorted(parent.glob("*.lock"), key=_last_used)
    sizes = {lock: _bytes_of(lock.with_suffix(""), *_beside(lock.with_suffix(""))) for lock in locks}
    total = sum(sizes.values())
    for lock in locks:
        if total <= most:
            return
        use = Use(lock.with_suffix(""))
        if use.claim():
            use.remove()
            total -= sizes[lock]


def _sweep(parent: Path) -> None:
    """Remove what nobody uses."""
    make_way(parent, limit=-1)


def _beside(directory: Path) -> list[Path]:
    """What a process that was killed left there while it made the directory; its lock excepted."""
    return [path for path in directory.parent.glob(f"{glob.escape(directory.name)}.*") if path.suffix != ".lock"]


def _bytes_of(*directories: Path) -> int:
    total = 0
    for path in (inner for directory in directories for inner in directory.rglob("*")):
        with suppress(OSError):
            total += path.lstat().st_size
    return total


def _last_used(lock: Path) -> float:
    try:
        return lock.stat().st_mtime
    except OSError:
        return 0.0


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (mine.st_dev, mine.st_ino) == (found.st_dev, found.st_ino)
