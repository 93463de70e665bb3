"""Reading what is needed next in a background thread while the present is worked on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ReadAhead(Generic[K, V]):
    """Values by key; those that are announced are read in advance, one after the other.

    Args:
        read: gives the value of a key; called in a background thread, and in the caller's for keys that were not
            announced.
        depth: values read ahead at most.
    """

    def __init__(self, read: Callable[[K], V], depth: int) -> None:
        self._read = read
        self._depth = depth
        self._ahead: dict[K, Future[V]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")

    def get(self, key: K, following: Sequence[K] = ()) -> V:
        """The value of `key`; then the values of `following` are read, and others that were read ahead are dropped.

        Raises:
            Exception: whatever reading `key` raised.
        """
        present = self._ahead.pop(key, None)
        self._announce(following[: self._depth])
        return self._read(key) if present is None else present.result()

    def close(self) -> None:
        """Stop reading ahead; returns when the thread has ended."""
        self._ahead.clear()
        self._thread.shutdown(cancel_futures=True)

    def _announce(self, keys: Sequence[K]) -> None:
        for key in set(self._ahead).difference(keys):
            self._ahead.pop(key).cancel()
        for key in keys:
            if key not in self._ahead:
                self._ahead[key] = self._thread.submit(self._read, key)
