"""What a node's cache of base models holds, and removing what nobody uses: only ever when somebody asks for it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime

from filelock import FileLock, Timeout
from rich.table import Table

from nexus_ray.checkpoints.cache_entry import Entry, cache_error, entries
from nexus_ray.errors import ConfigError, StorageError
from nexus_ray.storage.cache_root import cache_root
from nexus_ray.storage.scratch import Use

_IN_USE = "a process of this node uses it"


def contents() -> Table:
    """A table of the entries: what they are of, their size, when they were used last."""
    table = Table(title=f"base models in {cache_root()}", title_justify="left")
    for heading in ("name", "source", "GB", "state", "last used"):
        table.add_column(heading, justify="right" if heading == "GB" else "left", overflow="fold")
    for entry in entries():
        state = "whole" if entry.is_whole else "unfinished"
        size = f"{entry.disk_bytes / 1e9:,.2f}"
        table.add_row(entry.name, entry.source or "unknown", size, state, _ago(entry.last_used))
    return table


def clear(names: Sequence[str]) -> list[str]:
    """Remove entries by name; returns a line for each.

    Raises:
        ConfigError: there is no such entry; nothing is removed then.
        StorageError: one is in use or being fetched, or the file system refused.
    """
    known = {entry.name: entry for entry in entries()}
    for name in names:
        if name not in known:
            there = ", ".join(known) or "it is empty"
            raise ConfigError(f"the cache {cache_root()} has no entry {name!r}", f"it has: {there}")
    lines = []
    for name in names:
        size = known[name].disk_bytes
        reason = _remove(known[name])
        if reason:
            raise StorageError(f"{name} stays: {reason}", "clear it when that has ended")
        lines.append(f"removed {name}: {size / 1e9:,.2f} GB")
    return lines


def make_room(gigabytes: float) -> list[str]:
    """Remove entries that nobody uses, used least recently first, until so many GB of the disk are free.

    Raises:
        StorageError: there are not enough of them, or the file system refused.
    """
    lines = []
    for entry in reversed(entries()):
        if _free_gigabytes() >= gigabytes:
            break
        size = entry.disk_bytes
        reason = _remove(entry)
        lines.append(f"{entry.name} stays: {reason}" if reason else f"removed {entry.name}: {size / 1e9:,.2f} GB")
    free = _free_gigabytes()
    if free < gigabytes:
        raise StorageError(
            "; ".join([*lines, f"{free:,.2f} GB are free at {cache_root()}, not {gigabytes:g}"]),
            "free space that is not the cache's, or point NEXUS_RAY_CACHE at a larger disk of this node",
        )
    return [*lines, f"{free:,.2f} GB are free at {cache_root()}"]


def _remove(entry: Entry) -> str:
    """Remove an entry that nobody uses; else why it stays."""
    use = Use(entry.directory)
    try:
        with FileLock(entry.fetching, timeout=0):
            if not use.claim():
                return _IN_USE
            shutil.rmtree(entry.directory)
            use.remove()
    except Timeout:
        return "a process of this node fetches or checks it"
    except OSError as error:
        raise cache_error(error) from error
    return ""


def _free_gigabytes() -> float:
    place = cache_root()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free / 1e9


def _ago(time: datetime) -> str:
    hours = (datetime.now(UTC) - time).total_seconds() / 3600
    return f"{time.astimezone():%Y-%m-%d %H:%M}, {hours / 24:.0f} d ago" if hours >= 48 else f"{hours:.1f} h ago"
