"""Fetching one file into a local one, in ranges side by side; what a killed process had fetched is not fetched again.

Beside the unfinished file stands a journal of the ranges that are in it. It counts only while the machine has not
been restarted: what a process has written survives its death, but not that of the machine before it is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from upath import UPath

from nexus_ray.checkpoints.byte_files import read_range
from nexus_ray.checkpoints.remote_model import StoredFile
from nexus_ray.errors import ModelError
from nexus_ray.observing.metrics import add

PIECE_BYTES = 16 * 2**20
CONNECTIONS = 8
_HASH_BYTES = 4 * 2**20
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_UPLOAD = "leave the model alone while it is fetched, then run the same command again"


@dataclass(frozen=True)
class Hashes:
    """What a local file's bytes add up to, hexadecimal; no MD5 where none was asked for."""

    sha256: str
    md5: str | None


def fetch(source: UPath, file: StoredFile, partial: Path, advance: Callable[[int], None]) -> None:
    """Make `partial` the whole file; it may hold ranges of it already.

    Args:
        source: the remote file.
        file: its size and version.
        partial: local file to write; `partial` with ".pieces" added is its journal, which is left there.
        advance: is told of bytes as they arrive.

    Raises:
        ModelError: the file became shorter, or is gone.
        StorageError: the store refused, or failed for minutes.
        OSError: the local file system refused.
    """
    with _Journal(partial, file) as journal, _opened(partial, file.size) as descriptor:
        stop = threading.Event()

        def fetch_piece(piece: int) -> int:
            if stop.is_set():
                return 0
            start = piece * PIECE_BYTES
            content = _read(source, start, min(start + PIECE_BYTES, file.size))
            _write(descriptor, content, start)
            journal.add(piece)
            return len(content)

        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch") as pool:
            try:
                for done in as_completed([pool.submit(fetch_piece, piece) for piece in journal.missing()]):
                    count = done.result()
                    advance(count)
                    add("nexus_ray_cache_fetched_bytes", count)
            except BaseException:
                stop.set()
                raise
        os.fsync(descriptor)


def bytes_left(partial: Path, file: StoredFile) -> int:
    """Bytes that `fetch` would fetch."""
    with _Journal(partial, file, write=False) as journal:
        return sum(min(PIECE_BYTES, file.size - piece * PIECE_BYTES) for piece in journal.missing())


def journal_of(partial: Path) -> Path:
    """The journal of an unfinished file."""
    return partial.with_name(f"{partial.name}.pieces")


def hash_file(path: Path, *, md5: bool = False) -> Hashes:
    """SHA-256 of a local file, and its MD5 where it is wanted, in one pass."""
    hashers = [hashlib.sha256(), *([hashlib.md5(usedforsecurity=False)] if md5 else [])]
    with path.open("rb") as file:
        while content := file.read(_HASH_BYTES):
            for hasher in hashers:
                hasher.update(content)
    return Hashes(hashers[0].hexdigest(), hashers[1].hexdigest() if md5 else None)


@cache
def boot_id() -> str:
    """Identity of this run of the operating system; of this process where it has none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return f"process {os.getpid()} {os.urandom(8).hex()}"


def _read(source: UPath, start: int, stop: int) -> bytes:
    try:
        content = read_range(source, start, stop)
    except FileNotFoundError as error:
        raise ModelError(f"{source} is gone", _UPLOAD) from error
    if len(content) != stop - start:
        raise ModelError(f"{source} is cut off: it ends before byte {stop}", _UPLOAD)
    return content


def _write(descriptor: int, content: bytes, position: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


@contextmanager
def _opened(path: Path, size: int) -> Iterator[int]:
    """The descriptor of a file of this size, with holes where nothing has been written."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.ftruncate(descriptor, size)
        yield descriptor
    finally:
        os.close(descriptor)


class _Journal:
    """Which pieces of a file have been written, one number a line; the first line says of what.

    Args:
        partial: the unfinished file.
        file: what it will be.
        write: begin a new one where there is none that fits.
    """

    def __init__(self, partial: Path, file: StoredFile, *, write: bool = True) -> None:
        self._path, self._lock = journal_of(partial), threading.Lock()
        self._head = json.dumps([file.size, file.version, PIECE_BYTES, boot_id()])
        self._pieces = -(-file.size // PIECE_BYTES)
        self._done = self._written() if partial.exists() else set()
        if write:
            if not self._done:
                partial.unlink(missing_ok=True)
            # Written anew: a killed process may have left half a line at the end.
            self._path.write_text("".join(f"{line}\n" for line in [self._head, *sorted(self._done)]))
        self._file = self._path.open("a") if write else None

    def __enter__(self) -> _Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def missing(self) -> list[int]:
        """Pieces that are yet to be fetched."""
        return [piece for piece in range(self._pieces) if piece not in self._done]

    def add(self, piece: int) -> None:
        """A piece has been written."""
        assert self._file is not None
        with self._lock:
            self._file.write(f"{piece}\n")
            self._file.flush()

    def _written(self) -> set[int]:
        try:
            head, *lines, _ = self._path.read_text().split("\n")  # what follows the last line end was cut off
            return {int(line) for line in lines} if head == self._head else set()
        except (OSError, ValueError):
            return set()
