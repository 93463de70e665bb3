"""Bytes of a checkpoint's files by position: plain local reads, a private mapping, or ranges of a remote file.

Plain reads go straight into memory of their own, so what a process holds is what it asked for; the pages of a mapping
count as resident once touched, but all processes of a machine share them.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from fsspec import AbstractFileSystem
from torch import Tensor
from upath import UPath

from nexus_ray.errors import ModelError
from nexus_ray.storage import Place, is_remote, place_of
from nexus_ray.storage.retries import retrying

_REMOTE_PIECE_BYTES = 64 * 2**20
_DOWNLOAD = "download the model again"


class ByteFile(Protocol):
    """A file that is read by position.

    Attributes:
        location: where it is, for messages.
        size: bytes it holds.
    """

    location: Place
    size: int

    def read(self, start: int, stop: int) -> Tensor:
        """[stop - start] uint8: the bytes from `start` up to `stop`, which must lie inside the file.

        Raises:
            ModelError: the file is shorter than it was, or cannot be read.
        """
        ...

    def close(self) -> None:
        """Give the file back; tensors that were read stay valid."""
        ...


def locate(place: Place | str) -> Place:
    """Where a person says that something is.

    Raises:
        ModelError: nothing installed here opens this kind of URI.
    """
    try:
        return place_of(place)
    except ValueError as error:
        raise ModelError(f"{place} cannot be opened: {error}", "or copy the model to a local directory") from error


def exists(location: Place) -> bool:
    """Whether something is there.

    Raises:
        ModelError: the file system does not say.
        StorageError: the store does not say.
    """
    if is_remote(location):
        return remote_info(location) is not None
    try:
        return location.exists()
    except OSError as error:
        raise ModelError(f"{location} cannot be opened: {error.strerror}", "check its permissions") from error


def remote_info(location: UPath) -> dict[str, Any] | None:
    """What the store says about a file or directory; None where nothing is.

    Raises:
        StorageError: the store refused, or failed for minutes.
    """
    try:
        found: dict[str, Any] = retrying(lambda: location.fs.info(location.path), location, "look at")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found


def read_range(location: UPath, start: int, stop: int) -> bytes:
    """The bytes of a remote file from `start` up to `stop`, fewer where it ends before.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: the store refused, or failed for minutes.
    """
    filesystem = location.fs
    # What reads ranges through an opened file would read ahead, and throw that away.
    through_file = not filesystem.async_impl and type(filesystem).cat_file is AbstractFileSystem.cat_file
    options = {"cache_type": "none"} if through_file else {}
    return bytes(
        retrying(lambda: filesystem.cat_file(location.path, start=start, end=stop, **options), location, "read")
    )


def read_whole(location: Place) -> bytes:
    """All bytes of a small file.

    Raises:
        ModelError: it is missing or cannot be read.
    """
    file = open_file(location)
    try:
        return file.read(0, file.size).numpy().tobytes()
    finally:
        file.close()


def open_file(location: Place, *, mapped: bool = False) -> ByteFile:
    """Open a file for reading by position.

    Args:
        location: a local path or a remote place.
        mapped: map a local file privately: reads are views on it, writes to them never reach the file.

    Raises:
        ModelError: it is missing, is not a regular file, or a remote one was to be mapped.
    """
    if isinstance(location, Path):
        return MappedFile(location) if mapped else LocalFile(location)
    if mapped:
        raise ModelError(f"{location} is remote and cannot be memory-mapped", "copy the model to a local directory")
    return RemoteFile(location)


class LocalFile:
    """Positioned reads (preadv) of a local file."""

    def __init__(self, location: Path) -> None:
        self.location: Place = location
        self._descriptor = _open_regular(location)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, start: int, stop: int) -> Tensor:
        """As `ByteFile.read`, into fresh memory and nowhere else."""
        buffer = _empty(self, start, stop)
        view = buffer.numpy().data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], start + done)
            except OSError as error:
                raise ModelError(f"{self.location} cannot be read: {error.strerror}", "check the disk") from error
            if not count:
                raise _cut_off(self.location, stop)
            done += count
        return buffer

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


class MappedFile:
    """Views on a private, copy-on-write mapping of a local file."""

    def __init__(self, location: Path) -> None:
        self.location: Place = location
        descriptor = _open_regular(location)
        with os.fdopen(descriptor, "rb") as file:
            self.size = os.fstat(descriptor).st_size
            # numpy cannot map nothing
            content = np.memmap(file, np.uint8, mode="c") if self.size else np.empty(0, np.uint8)
        self._content = torch.from_numpy(content)

    def read(self, start: int, stop: int) -> Tensor:
        """As `ByteFile.read`: no byte is touched yet."""
        _check_range(self, start, stop)
        return self._content[start:stop]

    def close(self) -> None:
        """The mapping ends when the last view on it does."""
        del self._content


class RemoteFile:
    """Range reads of anything that fsspec opens; what fails in a way that passes is asked for again."""

    def __init__(self, location: UPath) -> None:
        self.location: Place = location
        self._remote = location
        found = remote_info(location)
        if found is None:
            raise ModelError(f"{location} is missing", "check the URI, or upload the model again")
        if not isinstance(found.get("size"), int):
            raise ModelError(f"{location} does not say how long it is", "copy the model to a local directory")
        self.size: int = found["size"]

    def read(self, start: int, stop: int) -> Tensor:
        """As `ByteFile.read`, in pieces, so that at most one piece is held twice."""
        buffer = _empty(self, start, stop)
        view = buffer.numpy().data
        for first in range(start, stop, _REMOTE_PIECE_BYTES):
            last = min(first + _REMOTE_PIECE_BYTES, stop)
            piece = self._read_piece(first, last)
            if len(piece) != last - first:
                raise _cut_off(self.location, stop)
            view[first - start : last - start] = piece
        return buffer

    def close(self) -> None:
        """Nothing is held open between reads."""

    def _read_piece(self, start: int, stop: int) -> bytes:
        try:
            return read_range(self._remote, start, stop)
        except FileNotFoundError as error:
            raise ModelError(f"{self.location} cannot be read: it is gone", "upload the model again") from error


def _open_regular(location: Path) -> int:
    try:
        if not stat.S_ISREG(location.stat().st_mode):  # opening a pipe would wait for ever
            raise ModelError(f"{location} is not a regular file", _DOWNLOAD)
        return os.open(location, os.O_RDONLY)
    except FileNotFoundError as error:
        raise ModelError(f"{location} is missing", _DOWNLOAD) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ModelError(f"{location} cannot be opened: {error}", "check the path and its permissions") from error


def _check_range(file: ByteFile, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= file.size:
        raise _cut_off(file.location, stop)


def _empty(file: ByteFile, start: int, stop: int) -> Tensor:
    """Memory for a range, never more than the file holds."""
    _check_range(file, start, stop)
    return torch.empty(stop - start, dtype=torch.uint8)


def _cut_off(location: Place, stop: int) -> ModelError:
    return ModelError(f"{location} is cut off: it ends before byte {stop}", _DOWNLOAD)
