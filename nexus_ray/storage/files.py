"""Writing artefacts so that a half-written one is never read: temporary name, flush, rename.

Every artefact of every stage goes through `atomic_file` or `atomic_directory`. A failure of the file system
becomes a `StorageError` that names the path; the temporary is removed and the previous artefact stays.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nexus_ray.errors import ArtefactError, StorageError

_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, then run the same command again: it continues"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, then run the same command again"),
    errno.EROFS: ("the file system is read-only", "choose another place with run.directory=PATH"),
    errno.EACCES: ("permission denied", "choose another place with run.directory=PATH"),
    errno.EPERM: ("not permitted", "choose another place with run.directory=PATH"),
    errno.ENOTDIR: ("a part of the path is a file, not a directory", "choose another run.directory"),
    errno.EEXIST: ("a file stands where a directory is needed", "choose another run.directory"),
}


def storage_error(error: OSError, path: Path) -> StorageError:
    """Turn an operating-system error about `path` into one a person can act on."""
    reason, hint = _REASONS.get(error.errno or 0, (error.strerror or str(error), "check the path and try again"))
    return StorageError(f"cannot write {path}: {reason}", hint)


def make_directory(path: Path) -> Path:
    """Create `path` and its parents if needed and return it.

    Raises:
        StorageError: the file system refused.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, path) from error
    return path


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
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; rename it to `path` when the block ends without an exception."""
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
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory; it takes the place of `path` when the block ends without an exception."""
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


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: JSON has no such numbers."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, *, what: str, hint: str) -> Any:
    """Read a JSON artefact.

    Args:
        path: the file.
        what: what the file is, for the error message, e.g. "router statistics".
        hint: how to make it.

    Raises:
        ArtefactError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"no {what} at {path}", hint) from error
    except (ValueError, OSError) as error:
        raise ArtefactError(f"the {what} at {path} cannot be read: {error}", hint) from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value in canonical form; equal values give equal digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
