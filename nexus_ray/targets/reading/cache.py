"""Arrow tables that were used last, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import pyarrow as pa

K = TypeVar("K", bound=Hashable)


class TableCache(Generic[K]):
    """The tables that were used last. One that is larger than the whole cache is not kept.

    Args:
        limit: bytes of all tables together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._tables: OrderedDict[K, pa.Table] = OrderedDict()

    def get(self, key: K, load: Callable[[], pa.Table]) -> pa.Table:
        """The table of `key`, loaded when it is not held."""
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        table = load()
        self._tables[key] = table
        self.held += _size(table)
        while self.held > self.limit:
            self.held -= _size(self._tables.popitem(last=False)[1])
        return table


def _size(table: pa.Table) -> int:
    return int(table.get_total_buffer_size())
