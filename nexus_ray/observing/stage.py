"""What a stage tells: that it began or went on, what it has done, how long it took, how it ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nexus_ray.observing.command import join_now, record
from nexus_ray.observing.metrics import add, labelled, put


@dataclass
class Tally:
    """What a stage has done so far in this command.

    Attributes:
        tokens: that it has processed.
        restarts: of workers.
        shards_bytes: bytes that workers of pools wrote, which count them themselves.
        bytes: of its outputs, when it is done.
    """

    tokens: int = 0
    restarts: int = 0
    shards_bytes: int = 0
    bytes: int = 0

    def as_values(self, seconds: float) -> dict[str, Any]:
        """What is known, for an event."""
        speed = {"tokens_per_second": round(self.tokens / max(seconds, 1e-9), 1)} if self.tokens else {}
        known = {"tokens": self.tokens, **speed, "worker_restarts": self.restarts, "bytes": self.bytes}
        return {"seconds": round(seconds, 3), **{name: value for name, value in known.items() if value}}


_tally = Tally()


def present_tally() -> Tally:
    """That of the stage at work in this process."""
    return _tally


@contextmanager
def telling_stage(name: str, recipe: str = "", *, continued: bool = False) -> Iterator[Tally]:
    """Tell of a stage that is done within the block, which says in the tally what it has made."""
    global _tally
    _tally = Tally()
    record("stage_continued" if continued else "stage_started", stage=name, recipe=recipe)
    join_now()
    began = time.monotonic()
    with labelled(stage=name):
        put("nexus_ray_stage_running", 1)
        try:
            yield _tally
        except BaseException as error:
            stopped = not isinstance(error, Exception)  # Ctrl-C, SIGTERM
            values = _tally.as_values(time.monotonic() - began)
            told = {"error": type(error).__name__, "message": str(error)}
            record("stage_stopped" if stopped else "stage_failed", stage=name, recipe=recipe, **values, **told)
            raise
        else:
            if not _tally.shards_bytes:
                add("nexus_ray_stage_written_bytes", _tally.bytes)
            record("stage_done", stage=name, recipe=recipe, **_tally.as_values(time.monotonic() - began))
        finally:
            put("nexus_ray_stage_running", 0)
            join_now()
