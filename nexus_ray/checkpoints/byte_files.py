"""Bytes of a checkpoint's files by position: plain local reads, a private mapping, or fsspec ranges.

Plain reads go straight into memory of their own, so what a process holds is what it asked for; the pages of a mapping
count as resident once touched, but all processes of a machine share them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec
import numpy as np
import torch
from torch import Tensor

from nexus_ray.errors import ModelError

Location = Path | str
_REMOTE_PIECE_BYTES = 64 * 2**20
_DOWNLOAD = "download the model again"
_Result = TypeVar("_Result")


class ByteFile(Protocol):
    """A file that is read by position.

    Attributes:
        location: where it is, for messages.
        size: bytes it holds.
    """

    location: Location
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


def locate(place: Location) -> Location:
    """A local path as `Path`, anything with a scheme ("s3://...") as the string it is."""
    return place if isinstance(place, str) and "://" in place else Path(place)


def child(directory: Location, name: str) -> Location:
    """The file `name` in a directory."""
    return directory / name if isinstance(directory, Path) else f"{directory.rstrip('/')}/{name}"


def file_name(location: Location) -> str:
    """The last part of a location."""
    return str(location).rstrip("/").rpartition("/")[2]


def exists(location: Location) -> bool:
    """Whether something is there.

    Raises:
        ModelError: the file system does not say.
    """
    if isinstance(location, Path):
        try:
            return location.exists()
        except OSError as error:
            raise ModelError(f"{location} cannot be opened: {error.strerror}", "check its permissions") from error
    return bool(_ask_remote(location, lambda filesystem, path: filesystem.exists(path)))


def read_whole(location: Location) -> bytes:
    """All bytes of a small file.

    Raises:
        ModelError: it is missing or cannot be read.
    """
    file = open_file(location)
    try:
        return file.read(0, file.size).numpy().tobytes()
    finally:
        file.close()


def open_file(location: Location, *, mapped: bool = False) -> ByteFile:
    """Open a file for reading by position.

    Args:
        location: a local path, or an fsspec URI.
        mapped: map a local file privately: reads are views on it, writes to them never reach the file.

    Raises:
        ModelError: it is missing, is not a regular file, or a URI was to be mapped.
    """
    if isinstance(location, Path):
        return MappedFile(location) if mapped else LocalFile(location)
    if mapped:
        raise ModelError(f"{location} is remote and cannot be memory-mapped", "copy the model to a local directory")
    return RemoteFile(location)


class LocalFile:
    """Positioned reads (preadv) of a local file."""

    def __init__(self, location: Path) -> None:
        self.location: Location = location
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
        self.location: Location = location
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
    """Range reads of anything that fsspec opens."""

    def __init__(self, location: str) -> None:
        self.location: Location = location
        self._filesystem, self._path = _filesystem(location)
        size = _ask_remote(location, lambda filesystem, path: filesystem.info(path)["size"])
        if not isinstance(size, int):
            raise ModelError(f"{location} does not say how long it is", "copy the model to a local directory")
        self.size = size

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
            return bytes(self._filesystem.cat_file(self._path, start=start, end=stop))
        except Exception as error:  # each backend raises types of its own
            raise ModelError(f"{self.location} cannot be read: {error}", "check the network and try again") from error


def _open_regular(location: Path) -> int:
    try:
        if not stat.S_ISREG(location.stat().st_mode):  # opening a pipe would wait for ever
            raise ModelError(f"{location} is not a regular file", _DOWNLOAD)
        return os.open(location, os.O_RDONLY)
    except FileNotFoundError as error:
        raise ModelError(f"{location} is missing", _DOWNLOAD) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ModelError(f"{location} cannot be opened: {error}", "check the path and its permissions") from error


def _filesystem(location: str) -> tuple[Any, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        hint = "install the package that fsspec names for this kind of storage, or copy the model to a local directory"
        raise ModelError(f"{location} cannot be opened: {error}", hint) from error
    return filesystem, str(path)


def _ask_remote(location: str, question: Callable[[Any, str], _Result]) -> _Result:
    filesystem, path = _filesystem(location)
    try:
        return question(filesystem, path)
    except FileNotFoundError as error:
        raise ModelError(f"{location} is missing", "check the URI, or upload the model again") from error
    except Exception as error:  # each backend raises types of its own
        raise ModelError(f"{location} cannot be opened: {error}", "check the URI, credentials and network") from error


def _check_range(file: ByteFile, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= file.size:
        raise _cut_off(file.location, stop)


def _empty(file: ByteFile, start: int, stop: int) -> Tensor:
    """Memory for a range, never more than the file holds."""
    _check_range(file, start, stop)
    return torch.empty(stop - start, dtype=torch.uint8)


def _cut_off(location: Location, stop: int) -> ModelError:
    return ModelError(f"{location} is cut off: it ends before byte {stop}", _DOWNLOAD)
