"""Rows of text that cannot be read: passed over, counted and reported, or refused at once when the run is strict.

A worker counts the rows of its shard, in the row that it returns; the driver adds these up and warns once a source.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from nexus_ray.errors import DataError

logger = logging.getLogger(__name__)
_HINT = "repair or remove such rows; --strict stops at the first, docs/data.md lists the forms of a row"


class UnreadableRows:
    """Counts rows that cannot be read.

    In a worker, pass `handler` to `pack_shard` and return `as_row()` beside the shard's index; in the driver, give
    each such row to `add_row`, then call `warn`.

    Args:
        strict: raise at the first one.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.count = 0
        self.example = ""
        self._by_source: dict[str, dict[int, tuple[int, str]]] = {}
        self._warned: set[str] = set()

    def handler(self, error: DataError) -> None:
        """Count a row, given what is wrong with it and where.

        Raises:
            DataError: the error itself, when strict.
        """
        if self.strict:
            raise error
        self.count += 1
        self.example = self.example or error.message

    def as_row(self) -> dict[str, Any]:
        """The rows counted in this worker, as fields of the row that it returns."""
        return {"unreadable": self.count, "unreadable_example": self.example}

    def add_row(self, source: str, row: Mapping[str, Any]) -> None:
        """Take in what a worker returned for a shard of `source`: `shard` and the fields of `as_row`.

        Rows may come in any order; a shard that is read again counts once.
        """
        counted = int(row["unreadable"]), str(row["unreadable_example"])
        self._by_source.setdefault(source, {})[int(row["shard"])] = counted

    def total(self, source: str) -> int:
        """Rows of a source that could not be read."""
        return sum(count for count, _ in self._by_source.get(source, {}).values())

    def first(self, source: str) -> str:
        """Place and fault of the first row of a source that could not be read, "" when all could."""
        return next((example for _, (count, example) in sorted(self._by_source.get(source, {}).items()) if count), "")

    def warn(self, split: str, without_text: Collection[str] = ()) -> None:
        """Log one warning for each source that had unreadable rows: how many, the place of the first, the reason.

        A source is warned of once, however often this is called.

        Args:
            split: train or heldout.
            without_text: sources of which no row was read.

        Raises:
            DataError: a source had unreadable rows and no other, or any when strict: an earlier call, which was not,
                may have left them.
        """
        for source in self._by_source:
            found = self.total(source)
            if not found or source in self._warned:
                continue
            self._warned.add(source)
            first = self.first(source)
            name = f"data.sources.{source}.{split}"
            if source in without_text:
                raise DataError(f"{name}: no row can be read; the first of {found:,}: {first}", _HINT)
            if self.strict:
                raise DataError(f"{name}: {first}", _HINT)
            rows = "1 row cannot be read and is" if found == 1 else f"{found:,} rows cannot be read and are"
            logger.warning("%s: %s left out; the first: %s (--strict stops there)", name, rows, first)
