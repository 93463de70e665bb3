"""The story of a run on a terminal: a table for every command, what went wrong below it, and totals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from rich.console import Group, RenderableType
from rich.text import Text

from nexus_ray.observing.story import CommandStory, StageSpan, Story, idle_before

_COLOURS = {"done": "green", "failed": "red", "lost": "red", "stopped": "yellow", "interrupted": "yellow"}
_SIGNS = {"worker": "x", "warning": "!", "signal": "#", "failed": "X", "resumed": ">", "note": "-", "clock": "~"}
_MOST_LINES = 12  # incidents of a command that are shown at each end of a long list
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def show_story(story: Story) -> Iterator[RenderableType]:
    """What is printed, part by part."""
    for number, command in enumerate(story.commands, start=1):
        if number > 1:
            yield Text(f"   {_gap(idle_before(story.commands)[number - 2])}", style="dim")
        yield _heading(number, command)
        if command.stages:
            yield _stages(command.stages)
        if command.skipped:
            yield Text(f"   complete, skipped: {', '.join(command.skipped)}", style="dim")
        yield from _incidents(command)
    yield Text(summary(story), style="bold")
    if len(story.commands) > 1:
        yield _totals(story)


def summary(story: Story) -> str:
    """One line about the whole run."""
    spans = [span for command in story.commands for span in command.stages]
    warnings = sum(incident.kind == "warning" for command in story.commands for incident in command.incidents)
    restarts = sum(span.restarts for span in spans)
    parts = [_count(len(story.commands), "command"), f"{duration(story.seconds)} at work"]
    if restarts:
        parts.append(_count(restarts, "worker death"))
    if warnings:
        parts.append(_count(warnings, "warning"))
    last = story.commands[-1]
    return f"{story.run}: {', '.join(parts)}; the last command: {_end(last)}"


def _heading(number: int, command: CommandStory) -> Group:
    began = command.began[:19].replace("T", " ")
    line = Text.assemble((f"{number}  ", "bold"), (_words(command.argv), "bold"), "  ", _coloured(command))
    where = [f"{began} UTC", f"{command.host}:{command.pid}", f"nexus-ray {command.versions.get('nexus-ray', '?')}"]
    where += [f"job {command.job}"] if command.job else []
    where += [f"configuration {command.config[:12]}"] if command.config else []
    lines = [line, Text("   " + ", ".join(where), style="dim")]
    lines += [Text(f"   {command.dashboard}", style="dim")] if command.dashboard else []
    return Group(*lines)


def _words(argv: Sequence[str]) -> str:
    """A command line as it was typed, as far as Python knows."""
    program = PurePath(argv[0]) if argv else PurePath("nexus-ray")
    name = "nexus-ray" if program.name in ("__main__.py", "nexus-ray") else program.name
    return " ".join([name, *argv[1:]])


def _coloured(command: CommandStory) -> Text:
    return Text(_end(command), style=_COLOURS.get(command.state, ""))


def _end(command: CommandStory) -> str:
    took = duration(command.seconds)
    match command.state:
        case "done":
            return f"done in {took}"
        case "lost":
            return f"vanished after {took}: killed, or its machine went away"
        case "running":
            return f"running for {took}"
        case _:
            return f"{command.state} after {took}, exit code {command.exit_code}"


def _stages(spans: Sequence[StageSpan]) -> Text:
    header = ("stage", "", "from", "took", "tokens", "tokens/s", "outputs", "deaths", "checkpoints")
    rows = [
        (
            span.stage,
            _state(span),
            clock(span.began),
            duration(span.seconds),
            f"{span.tokens:,}" if span.tokens else "",
            f"{span.tokens_per_second:,.0f}" if span.tokens_per_second else "",
            size(span.bytes) if span.bytes else "",
            str(span.restarts or ""),
            str(len(span.checkpoints) or ""),
        )
        for span in spans
    ]
    return _table(header, rows, [_COLOURS.get(span.state, "") for span in spans], left=2)


def _state(span: StageSpan) -> str:
    state = "vanished" if span.state == "lost" else span.state
    return f"{state}, continued" if span.continued else state


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], colours: Sequence[str], left: int) -> Text:
    """Rows below a header, as wide as they are: a table that leaves out letters in a narrow pipe helps nobody.

    Args:
        header: of the columns; those in which no row has anything are left out.
        rows: cells.
        colours: of each row's second cell.
        left: so many columns start on the left, the others end on the right.
    """
    kept = [column for column in range(len(header)) if any(row[column] for row in rows)]
    widths = {column: max(len(row[column]) for row in [header, *rows]) for column in kept}

    def line(row: Sequence[str]) -> list[str]:
        return [row[c].ljust(widths[c]) if c < left else row[c].rjust(widths[c]) for c in kept]

    text = Text("   " + "  ".join(line(header)).rstrip(), style="")
    for row, colour in zip(rows, colours, strict=True):
        first, second, *others = line(row)
        text.append(f"\n   {first}  ").append(second, style=colour).append(f"  {'  '.join(others)}".rstrip())
    return text


def _incidents(command: CommandStory) -> Iterator[Text]:
    lines = [
        Text(f"   {clock(incident.moment):>8} {_SIGNS.get(incident.kind, '-')} {incident.text.splitlines()[0]}")
        for incident in command.incidents
        if incident.text
    ]
    if len(lines) > 2 * _MOST_LINES + 1:
        left_out = len(lines) - 2 * _MOST_LINES
        lines = [*lines[:_MOST_LINES], Text(f"   ... {left_out} more, see --json", style="dim"), *lines[-_MOST_LINES:]]
    yield from lines


def _gap(seconds: float) -> str:
    if seconds < 0:
        return f"(a clock was set back, or this one began {duration(-seconds)} before the one above ended)"
    return f"({duration(seconds)} later)"


def _totals(story: Story) -> Text:
    """Stages over all commands."""
    spans: dict[str, list[StageSpan]] = defaultdict(list)
    for command in story.commands:
        for span in command.stages:
            spans[span.stage].append(span)
    rows = [
        (
            stage,
            str(len(of_stage)),
            duration(sum(span.seconds for span in of_stage)),
            f"{sum(span.tokens for span in of_stage):,}",
            str(sum(span.restarts for span in of_stage)),
        )
        for stage, of_stage in spans.items()
    ]
    header = ("all commands", "attempts", "time", "tokens", "deaths")
    return _table(header, rows, [""] * len(rows), left=1)


def duration(seconds: float) -> str:
    """A length of time in the two largest units it has, e.g. `3 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    for unit, name, smaller, smaller_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // smaller} {smaller_name}"
    raise AssertionError(seconds)


def clock(seconds: float) -> str:
    """A moment of a command as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: int) -> str:
    """Bytes in a unit that suits."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
