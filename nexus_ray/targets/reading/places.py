"""A directory of files on the local disk or behind any URI that fsspec opens, read by byte range.

Nothing stays open between reads, so threads and processes may share a place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from nexus_ray.errors import StorageError

_INSTALL = "install the package that fsspec names for this kind of storage, or copy the directory to the local disk"


class Place:
    """Files of one directory.

    Args:
        location: a path, or a URI with a scheme ("s3://bucket/targets").

    Raises:
        StorageError: nothing here opens this kind of URI.
    """

    def __init__(self, location: Path | str) -> None:
        self._location = str(location).rstrip("/") or "/"
        self._filesystem, self._root = _filesystem(self._location)

    def __str__(self) -> str:
        return self._location

    def path(self, name: str) -> str:
        """Where a file is, for messages."""
        return f"{self._location.rstrip('/')}/{name}"

    def sizes(self) -> dict[str, int]:
        """Bytes of the files that one listing of the directory shows; storage without listings shows none.

        Raises:
            StorageError: the file system refused.
        """
        self._filesystem.invalidate_cache(self._root)
        try:
            entries = self._filesystem.ls(self._root, detail=True)
        except (FileNotFoundError, NotADirectoryError, NotImplementedError):
            return {}
        except Exception as error:  # each kind of storage raises types of its own
            raise _unreadable(self._location, error) from error
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if _is_sized(entry)}

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none.

        Raises:
            StorageError: the file system does not say.
        """
        try:
            found = self._filesystem.info(self._inside(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:  # each kind of storage raises types of its own
            raise _unreadable(self.path(name), error) from error
        return int(found["size"]) if _is_sized(found) else None

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, fewer where it ends before.

        Raises:
            StorageError: it is missing or cannot be read.
        """
        try:
            content = bytes(self._filesystem.cat_file(self._inside(name), start=start, end=stop))
        except Exception as error:  # each kind of storage raises types of its own
            raise _unreadable(self.path(name), error) from error
        if len(content) > stop - start:
            raise StorageError(f"{self.path(name)}: its server ignores byte ranges", "copy the set to another place")
        return content

    def _inside(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


def _filesystem(location: str) -> tuple[Any, str]:
    if "://" not in location:
        return LocalFileSystem(), str(Path(location).absolute())
    try:
        filesystem, root = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise StorageError(f"{location} cannot be opened: {error}", _INSTALL) from error
    return filesystem, str(root)


def _is_sized(entry: dict[str, Any]) -> bool:
    return entry["type"] != "directory" and entry["size"] is not None


def _unreadable(path: str, error: Exception) -> StorageError:
    hint = "check the path, its permissions, the disk or the network, and try again"
    return StorageError(f"{path} cannot be read: {error}", hint)
