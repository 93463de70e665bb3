"""The story of a run, made from its events: commands in order, what each did stage by stage, and what went wrong.

Durations are differences of a clock that nobody sets; times of day are shown as the events have them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import groupby, pairwise
from typing import Any

from nexus_ray.errors import ArtefactError
from nexus_ray.observing.command import INTERRUPTED
from nexus_ray.observing.event_files import Event, read_events
from nexus_ray.observing.incidents import Incident, incidents_of
from nexus_ray.storage import Place

_ENDS = {"stage_done": "done", "stage_failed": "failed", "stage_stopped": "stopped"}


@dataclass
class StageSpan:
    """A stage in one command.

    Attributes:
        stage: its name.
        recipe: digest of what decides its result.
        continued: whether it went on from what an earlier command had left.
        began: seconds after the start of the command.
        seconds: that it took, or until the last event of a command that vanished.
        state: done, failed, stopped (told to), lost (the command vanished) or running.
        tokens: that it processed in this command; of training those in the loss, as far as they were told of.
        bytes: of its outputs, once it is done.
        restarts: of workers that died.
        checkpoints: seconds after the start of the command.
        reason: why it failed.
    """

    stage: str
    recipe: str
    continued: bool
    began: float
    seconds: float = 0.0
    state: str = "lost"
    tokens: int = 0
    bytes: int = 0
    restarts: int = 0
    checkpoints: list[float] = field(default_factory=list)
    reason: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        """Over all of its time, starting workers and loading models among it."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None


@dataclass
class CommandStory:
    """One command.

    Attributes:
        name: of its event file.
        argv: command line.
        began: UTC time, ISO 8601.
        host: where it ran.
        pid: its process.
        versions: of packages.
        config: digest of the configuration, without trackers.
        seconds: that it took, or until its last event.
        state: done, failed, interrupted, lost (no end was recorded: killed, or its machine vanished) or running.
        exit_code: None where no end was recorded.
        message: of the error that ended it.
        job: Ray's id of the job.
        dashboard: its page in Ray's dashboard.
        stages: those it worked at.
        skipped: stages that were complete.
        incidents: what went wrong or was noteworthy.
    """

    name: str
    argv: list[str]
    began: str
    host: str
    pid: int
    versions: dict[str, str]
    config: str | None
    seconds: float
    state: str
    exit_code: int | None = None
    message: str = ""
    job: str = ""
    dashboard: str = ""
    stages: list[StageSpan] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)


@dataclass
class Story:
    """A run's.

    Attributes:
        run: its directory.
        commands: in order.
    """

    run: str
    commands: list[CommandStory]

    @property
    def seconds(self) -> float:
        """Time at work, of all commands together."""
        return sum(command.seconds for command in self.commands)

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        value = asdict(self) | {"seconds": round(self.seconds, 3)}
        for command, told in zip(self.commands, value["commands"], strict=True):
            for span, as_json in zip(command.stages, told["stages"], strict=True):
                as_json["tokens_per_second"] = span.tokens_per_second
        return value


def read_story(directory: Place) -> Story:
    """The story of a run directory.

    Raises:
        ArtefactError: nothing was recorded there, or it cannot be read.
    """
    try:
        events = read_events(directory)
    except Exception as error:  # whatever a storage raises
        raise ArtefactError(f"the events of {directory} cannot be read: {error}", "check the path") from error
    if not events:
        raise ArtefactError(f"{directory} has no events", "name a run directory, e.g. runs/demo")
    return Story(str(directory), tell(events))


def tell(events: Iterable[Event]) -> list[CommandStory]:
    """The commands of a run from its events, which are in order."""
    by_command = [list(group) for _, group in groupby(events, lambda event: event["command"])]
    return [_command(group, is_last=group is by_command[-1]) for group in by_command]


def began_at(command: CommandStory) -> datetime:
    """When it began, as the clock of its machine had it."""
    return datetime.fromisoformat(command.began)


def idle_before(commands: Sequence[CommandStory]) -> list[float]:
    """Seconds from the end of each command but the last to the start of the next; less than 0: a clock was set back."""
    starts = [began_at(command) for command in commands]
    apart = [(after - before).total_seconds() for before, after in pairwise(starts)]
    return [seconds - command.seconds for seconds, command in zip(apart, commands, strict=False)]


def _command(events: Sequence[Event], *, is_last: bool) -> CommandStory:
    own = [event for event in events if "process" not in event] or events
    first = next((event for event in own if event["event"] == "command"), own[0])
    end = next((event for event in reversed(own) if event["event"] == "end"), None)
    ray = next((event for event in own if event["event"] == "ray"), {})
    told = CommandStory(
        name=str(first["command"]),
        argv=[str(word) for word in first.get("argv", [])],
        began=str(first["time"]),
        host=str(first.get("host", "")),
        pid=int(first.get("pid", 0)),
        versions=dict(first.get("versions", {})),
        config=first.get("config"),
        seconds=float(end["offset"] if end else max(_moment(event) for event in events)),
        state=_state(end, first, is_last),
        exit_code=end.get("exit_code") if end else None,
        message=str(end.get("message", "")) if end else "",
        job=str(ray.get("submission") or ray.get("job") or ""),
        dashboard=str(ray.get("dashboard", "")),
        incidents=incidents_of(events),
    )
    if told.state == "running":
        told.seconds = max(told.seconds, (datetime.now(UTC) - began_at(told)).total_seconds())
    told.stages = _stages(events, told)
    told.skipped = [str(event.get("stage", "?")) for event in own if event["event"] == "stage_skipped"]
    return told


def _state(end: Event | None, first: Event, is_last: bool) -> str:
    if end is not None:
        code = end.get("exit_code")
        return "done" if code == 0 else "interrupted" if code == INTERRUPTED else "failed"
    return "running" if is_last and _runs_here(first) else "lost"


def _runs_here(first: Event) -> bool:
    """Whether a command's process is alive on this machine; that of another machine counts as lost."""
    if first.get("host") != socket.gethostname():
        return False
    with suppress(OSError):
        os.kill(int(first["pid"]), 0)  # asks only
        return True
    return False


def _stages(events: Sequence[Event], command: CommandStory) -> list[StageSpan]:
    spans: list[StageSpan] = []
    trained: dict[str, int] = {}  # tokens of the present stage's training, by process
    for event in events:
        kind = event["event"]
        if kind in ("stage_started", "stage_continued"):
            trained = {}
            spans.append(_begin(event))
        elif spans and kind in _ENDS:
            _end(spans[-1], event, sum(trained.values()))
        elif spans:
            spans[-1].restarts += {"worker_restarted": 1, "workers_failed": len(event.get("ranks", []))}.get(kind, 0)
            if "process" in event and "tokens" in event:
                trained[f"{event.get('host')}:{event.get('pid')}:{event.get('after')}"] = int(event["tokens"])
            if kind == "checkpoint":
                spans[-1].checkpoints.append(_moment(event))
    if spans and spans[-1].state == "lost":
        spans[-1].state = "running" if command.state == "running" else "lost"
        spans[-1].seconds, spans[-1].tokens = command.seconds - spans[-1].began, sum(trained.values())
    return spans


def _begin(event: Event) -> StageSpan:
    continued = event["event"] == "stage_continued"
    return StageSpan(str(event.get("stage", "?")), str(event.get("recipe", "")), continued, _moment(event))


def _end(span: StageSpan, event: Event, trained: int) -> None:
    span.state = _ENDS[event["event"]]
    span.seconds = float(event.get("seconds", 0))
    span.bytes = int(event.get("bytes", 0))
    span.tokens = int(event.get("tokens", 0)) or trained
    span.reason = str(event.get("message", ""))


def _moment(event: Event) -> float:
    return float(event["moment"] if "moment" in event else event["offset"])
