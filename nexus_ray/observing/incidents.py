"""What went wrong, or was noteworthy, in a command: worker deaths, warnings, signals, failures, jumps of the clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from nexus_ray.observing.event_files import Event

_JUMP_SECONDS = 2.0  # two clocks that tick differently drift, but not by as much between two events


@dataclass(frozen=True)
class Incident:
    """Something that happened.

    Attributes:
        moment: seconds after the start of the command.
        kind: worker, warning, signal, failed, resumed, note or clock.
        text: for people.
    """

    moment: float
    kind: str
    text: str


def incidents_of(events: Sequence[Event]) -> list[Incident]:
    """Those of one command, in order."""
    found = [incident for event in events if (incident := _incident(event)) is not None]
    return sorted([*found, *_jumps(events)], key=lambda incident: incident.moment)


def _incident(event: Event) -> Incident | None:
    """What an event says, in words; another version may have left out what this one would tell."""
    moment = float(event["moment"] if "moment" in event else event["offset"])
    get = defaultdict(lambda: "?", event)
    match event["event"]:
        case "warning":
            return Incident(moment, "warning", str(get["message"]))
        case "worker_restarted":
            text = f"{get['pool']}: a worker died; {get['worker']} took its place, {get['left']} pieces left"
            return Incident(moment, "worker", text)
        case "workers_failed":
            ranks = ", ".join(str(rank) for rank in event.get("ranks", ()))
            return Incident(moment, "worker", f"training worker {ranks} failed: {get['error']}: {get['reason']}")
        case "resume":
            return Incident(moment, "resumed", f"training goes on from step {get['step']}")
        case "preemption":
            return Incident(moment, "worker", "a node is about to be taken away: a checkpoint is written at once")
        case "early_stop":
            return Incident(moment, "note", f"training stopped early after step {get['step']}")
        case "stop_signal":
            return Incident(moment, "signal", f"told to stop ({get['signal']})")
        case "stage_failed":
            return Incident(moment, "failed", f"{get['stage']} failed: {event.get('message') or get['error']}")
        case _:
            return None


def _jumps(events: Sequence[Event]) -> Iterator[Incident]:
    """Moments at which a clock was set, or the machine slept: the time went on by more or less than the seconds did."""
    own = [event for event in events if "process" not in event]
    for before, after in pairwise(own):
        jump = (_time(after) - _time(before)) - (after["offset"] - before["offset"])
        if abs(jump) > _JUMP_SECONDS:
            text = f"the clock jumped by {jump:+,.0f} s, or the machine slept"
            yield Incident(float(after["offset"]), "clock", text)


def _time(event: Event) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()
