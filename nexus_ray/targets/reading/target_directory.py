"""The directory of a target set, on a disk or behind any URI that fsspec opens, read by byte range.

Nothing stays open between reads, so threads and processes may share it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from nexus_ray.errors import StorageError
from nexus_ray.storage import Place, is_remote, place_of, read_bytes, retrying, size_of

_INSTALL = "install the package that is named for this kind of storage, or copy the directory to the local disk"
Result = TypeVar("Result")


class TargetDirectory:
    """Files of one directory.

    Args:
        location: a path, or a URI with a scheme ("s3://bucket/targets").

    Raises:
        StorageError: nothing here opens this kind of URI.
    """

    def __init__(self, location: Place | str) -> None:
        self._location = str(location).rstrip("/") or "/"
        try:
            self._place = place_of(self._location)
        except ValueError as error:
            raise StorageError(f"{self._location} cannot be opened: {error}", _INSTALL) from error

    @property
    def is_remote(self) -> bool:
        """Whether each read is a request over a network."""
        return is_remote(self._place)

    def __str__(self) -> str:
        return self._location

    def path(self, name: str) -> str:
        """Where a file is, for messages."""
        return f"{self._location.rstrip('/')}/{name}"

    def sizes(self) -> dict[str, int]:
        """Bytes of the files that one listing of the directory shows; storage without listings shows none.

        An object store may list what was there a while ago.

        Raises:
            StorageError: the file system refused.
        """
        try:
            return _readable(self._location, self._listed)
        except (FileNotFoundError, NotADirectoryError, NotImplementedError):
            return {}

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none.

        Raises:
            StorageError: the file system does not say.
        """
        return _readable(self.path(name), lambda: size_of(self._place / name))

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, fewer where it ends before.

        Raises:
            StorageError: it is missing or cannot be read.
        """
        try:
            content = _readable(self.path(name), lambda: read_bytes(self._place / name, start, stop))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _unreadable(self.path(name), error) from error
        if len(content) > stop - start:
            raise StorageError(f"{self.path(name)}: its server ignores byte ranges", "copy the set to another place")
        return content

    def _listed(self) -> dict[str, int]:
        place = self._place
        if not is_remote(place):
            with os.scandir(place) as entries:
                return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        found = retrying(lambda: place.fs.ls(place.path, detail=True), place, "list")
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in found if _is_sized(entry)}


def _is_sized(entry: dict[str, Any]) -> bool:
    return entry["type"] != "directory" and entry["size"] is not None


def _readable(path: str, action: Callable[[], Result]) -> Result:
    try:
        return action()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> StorageError:
    hint = "check the path, its permissions, the disk or the network, and try again"
    return StorageError(f"{path} cannot be read: {error}", hint)
