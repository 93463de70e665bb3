"""A directory for libraries that write files of their own: one that belongs in an object store is copied there.

It is copied as it grows: readers of such files, event files and logs, cope with a last record that is cut.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path

from nexus_ray.errors import StorageError
from nexus_ray.storage import Place, is_remote, make_directory
from nexus_ray.storage.objects import upload
from nexus_ray.storage.scratch import working_directory

logger = logging.getLogger(__name__)
_INTERVAL_SECONDS = 30.0
_SHARE = 20  # whole files go over the network each time: for one second of it, so many without


class Mirrored:
    """A directory on this machine; used by one thread.

    Args:
        place: where its files belong. A local one is used as it is.

    Attributes:
        directory: to write into; it ends with `close` if it was only on the way.

    Raises:
        StorageError: this machine's disk refused.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._stack = ExitStack()
        self.directory: Path = self._stack.enter_context(working_directory()) if is_remote(place) else place
        make_directory(self.directory)
        self._copied: dict[str, tuple[int, int]] = {}
        self._next = time.monotonic() + _INTERVAL_SECONDS

    def copy_if_due(self) -> None:
        """Copy what has changed, now and then; a store that refuses is asked again the next time."""
        if not is_remote(self._place) or time.monotonic() < self._next:
            return
        began = time.monotonic()
        try:
            self.copy()
        except StorageError as error:
            logger.warning("%s; it is tried again later", error.message)
        ended = time.monotonic()
        self._next = ended + max(_INTERVAL_SECONDS, _SHARE * (ended - began))

    def copy(self) -> None:
        """Copy what has changed since it was copied.

        Raises:
            StorageError: the object store does not answer or refuses.
        """
        if not is_remote(self._place):
            return
        for file in sorted(self.directory.rglob("*")):
            if file.is_symlink() or not file.is_file():
                continue
            name, status = file.relative_to(self.directory).as_posix(), file.stat()
            state = status.st_size, status.st_mtime_ns
            if self._copied.get(name) != state:
                upload(file, self._place / name)
                self._copied[name] = state

    def close(self) -> None:
        """Copy what is left.

        Raises:
            StorageError: the object store does not answer or refuses.
        """
        with self._stack:
            self.copy()
