"""Writing artefacts so that a half-written one is never read.

Every artefact of every stage goes through `atomic_file` or `atomic_directory`. On a file system it gets a temporary
name, is flushed and renamed; in an object store it appears when all of it has arrived. A failure becomes a
`StorageError` that names the place; the temporary is removed and the previous artefact stays.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from upath import UPath

from nexus_ray.errors import StorageError
from nexus_ray.storage.objects import upload, write_object
from nexus_ray.storage.places import Place, is_remote
from nexus_ray.storage.published import publishing
from nexus_ray.storage.scratch import working_directory

_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, then run the same command again: it continues"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, then run the same command again"),
    errno.EROFS: ("the file system is read-only", "choose another place with run.directory=PATH"),
    errno.EACCES: ("permission denied", "choose another place with run.directory=PATH"),
    errno.EPERM: ("not permitted", "choose another place with run.directory=PATH"),
    errno.ENOTDIR: ("a part of the path is a file, not a directory", "choose another run.directory"),
    errno.EEXIST: ("a file stands where a directory is needed", "choose another run.directory"),
}


def storage_error(error: OSError, path: Place) -> StorageError:
    """Turn an operating-system error about `path` into one a person can act on."""
    reason, hint = _REASONS.get(error.errno or 0, (error.strerror or str(error), "check the path and try again"))
    return StorageError(f"cannot write {path}: {reason}", hint)


PlaceT = TypeVar("PlaceT", Path, UPath, Place)


def make_directory(place: PlaceT) -> PlaceT:
    """Create a directory and its parents if needed and return it; an object store has none and needs none.

    Raises:
        StorageError: the file system refused.
    """
    if not is_remote(place):
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, place) from error
    return place


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_mode() -> int:
    """Mode of an ordinary new file: some libraries write files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _is_ours(path: Path) -> bool:
    """Whether a regular file was written here: one with another name elsewhere (a hard link) is shared and stays."""
    status = path.lstat()
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_file(place: Place) -> Iterator[Path]:
    """Yield a temporary local path to write; it becomes `place` when the block ends without an exception.

    Raises:
        StorageError: the file system or the store refused; what was there is still there.
    """
    if not is_remote(place):
        with _renamed_file(place) as temporary:
            yield temporary
        return
    with working_directory() as directory:
        try:
            yield directory / place.name
        except OSError as error:
            raise storage_error(error, directory) from error
        upload(directory / place.name, place)


@contextmanager
def atomic_directory(place: Place) -> Iterator[Path]:
    """Yield a temporary local directory; it takes the place of `place` when the block ends without an exception.

    In an object store read it with `local_directory`: its files lie below a name of their own, which changes.

    Raises:
        StorageError: the file system or the store refused; what was there is still there.
    """
    if not is_remote(place):
        with _renamed_directory(place) as temporary:
            yield temporary
        return
    with publishing(place) as temporary:
        try:
            yield temporary
        except OSError as error:
            raise storage_error(error, temporary) from error


@contextmanager
def _renamed_file(path: Path) -> Iterator[Path]:
    make_directory(path.parent)
    temporary = _temporary_beside(path)
    try:
        yield temporary
        _flush_to_disk(temporary)
        temporary.replace(path)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        _remove(temporary)


@contextmanager
def _renamed_directory(path: Path) -> Iterator[Path]:
    make_directory(path.parent)
    temporary = _temporary_beside(path)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if _is_ours(file):
                _flush_to_disk(file)
                file.chmod(_file_mode())
        replace_directory(temporary, path)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        _remove(temporary)


def replace_directory(source: Path, destination: Path) -> None:
    """Rename directory `source` to `destination`; what stood there is moved aside first and then removed."""
    if destination.exists():
        aside = _temporary_beside(destination)
        destination.rename(aside)
        try:
            source.rename(destination)
        except OSError:
            aside.rename(destination)
            raise
        _remove(aside)
    else:
        source.rename(destination)


def write_text(place: Place, text: str) -> None:
    """Write a text file atomically."""
    if is_remote(place):
        write_object(place, text.encode())
        return
    with atomic_file(place) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(place: Place, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: JSON has no such numbers."""
    write_text(place, json.dumps(value, indent=2, allow_nan=False) + "\n")
