"""Events as a command would write them, made by hand for what reads them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


class Command:
    """Writes the events of one command.

    Args:
        directory: of the run.
        number: of the command.
        began: what its clock says when it begins.
    """

    def __init__(self, directory: Path, number: int, began: datetime = NOON) -> None:
        self.name = f"{number:04d}-{began:%Y%m%dT%H%M%SZ}-vm-{40 + number}-0000"
        self._directory = directory
        self._began = began
        self._seq: dict[str, int] = {}
        self.add(
            0, "command", argv=["nexus-ray", "run", "a.yaml"], host="far-away", pid=7, versions={}, config="c" * 64
        )

    def add(self, offset: float, event: str, *, clock: float = 0.0, of: str = "", **values: Any) -> None:
        """An event so many seconds after the start, by a clock that is then wrong by `clock` seconds.

        `of` names another process, whose own clock counts from when it wrote first.
        """
        name = f"{self.name}+{of}" if of else self.name
        seq = self._seq[name] = self._seq.get(name, -1) + 1
        common: dict[str, Any] = {"command": self.name}
        if of:
            common |= {"process": "training worker", "host": of, "pid": 1}
        stamp = (self._began + timedelta(seconds=offset + clock)).isoformat(timespec="milliseconds")
        line = common | {"seq": seq, "time": stamp, "offset": offset, "event": event} | values
        path = self._directory / "events" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def eventful_run(directory: Path) -> None:
    """Three commands: one that vanished in `precompute`, one whose training failed, one that ended well."""
    first = Command(directory, 1)
    first.add(1, "stage_started", stage="collect", recipe="r")
    first.add(20, "worker_restarted", pool="collect router statistics", worker="far-away:9", left=12)
    first.add(61, "stage_done", stage="collect", recipe="r", seconds=60.0, tokens=6000, bytes=2048)
    first.add(62, "stage_started", stage="precompute", recipe="p")
    first.add(92, "warning", message="there is little text", level="WARNING", logger="nexus_ray")
    second = Command(directory, 2, NOON + timedelta(hours=3))
    second.add(1, "stage_skipped", stage="collect", recipe="r")
    second.add(2, "stage_continued", stage="precompute", recipe="p")
    second.add(32, "stage_done", stage="precompute", recipe="p", seconds=30.0, tokens=3000, bytes=4096)
    second.add(33, "stage_started", stage="train", recipe="t")
    second.add(70, "stage_failed", stage="train", recipe="t", seconds=37.0, error="NexusError", message="it diverges")
    second.add(71, "end", exit_code=1, seconds=71.0, error="NexusError", message="it diverges")
    third = Command(directory, 3, NOON + timedelta(hours=4))
    third.add(1, "stage_continued", stage="train", recipe="t")
    third.add(0, "checkpoint", of="n1", after=10.0, clock=20, step=4, tokens=400)
    third.add(30, "checkpoint", of="n1", after=10.0, clock=20, step=8, tokens=800)
    third.add(60, "workers_failed", ranks=[0, 1], error="ActorDiedError", reason="the node is gone")
    third.add(101, "stage_done", stage="train", recipe="t", seconds=100.0, bytes=1024)
    third.add(102, "end", exit_code=0, seconds=102.0)
