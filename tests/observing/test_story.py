"""The story: what each command did, in order, what went wrong, how it went on; as text, as JSON and as a timeline."""

from __future__ import annotations

import json
import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from observing.made_events import NOON, Command, eventful_run

from nexus_ray import plot_style
from nexus_ray.cli import run_command
from nexus_ray.observing.story import Story, idle_before, read_story
from nexus_ray.observing.story_text import clock, duration, size
from nexus_ray.plots import plot_story


@pytest.fixture
def eventful(tmp_path: Path) -> Path:
    eventful_run(tmp_path)
    return tmp_path


def spans(story: Story) -> list[tuple[str, str, bool]]:
    return [(span.stage, span.state, span.continued) for command in story.commands for span in command.stages]


def test_stages_are_done_failed_or_lost_and_say_whether_they_went_on(eventful: Path):
    story = read_story(eventful)
    assert [command.state for command in story.commands] == ["lost", "failed", "done"]
    assert spans(story) == [
        ("collect", "done", False),
        ("precompute", "lost", False),
        ("precompute", "done", True),
        ("train", "failed", False),
        ("train", "done", True),
    ]
    assert story.commands[1].skipped == ["collect"]
    assert story.commands[1].stages[1].reason == "it diverges"


def test_a_lost_command_is_known_until_its_last_event(eventful: Path):
    lost = read_story(eventful).commands[0]
    assert (lost.seconds, lost.stages[1].seconds, lost.exit_code) == (92, 30, None)


def test_tokens_deaths_and_checkpoints_are_counted_by_stage(eventful: Path):
    collect, _, _, _, train = [span for command in read_story(eventful).commands for span in command.stages]
    assert (collect.tokens, collect.tokens_per_second, collect.restarts, collect.bytes) == (6000, 100, 1, 2048)
    assert (train.tokens, train.tokens_per_second, train.restarts) == (800, 8, 2)
    assert train.checkpoints == [20, 50], "by the worker's clock, which is right"


def test_incidents_are_in_order_and_say_what_happened(eventful: Path):
    first, second, third = read_story(eventful).commands
    assert [incident.kind for incident in first.incidents] == ["worker", "warning"]
    assert [incident.text for incident in second.incidents] == ["train failed: it diverges"]
    assert "training worker 0, 1 failed: ActorDiedError: the node is gone" in third.incidents[0].text


def test_a_clock_that_jumps_is_told_and_changes_no_duration(tmp_path: Path):
    command = Command(tmp_path, 1)
    command.add(1, "stage_started", stage="collect", recipe="r")
    command.add(11, "stage_done", stage="collect", recipe="r", seconds=10.0, clock=-3600)
    command.add(12, "end", exit_code=0, clock=-3600)
    Command(tmp_path, 2, NOON - timedelta(hours=2)).add(1, "end", exit_code=0)
    story = read_story(tmp_path)
    assert [incident.text for incident in story.commands[0].incidents] == [
        "the clock jumped by -3,600 s, or the machine slept"
    ]
    assert story.commands[0].seconds == 12
    assert story.commands[0].stages[0].seconds == 10
    assert idle_before(story.commands)[0] < 0


def test_a_command_that_is_at_work_here_is_running(tmp_path: Path):
    for number, pid in ((1, os.getpid()), (2, os.getpid())):
        command = Command(tmp_path, number)
        command.add(0, "command", argv=["x"], host=socket.gethostname(), pid=pid)
        lines = (tmp_path / "events" / f"{command.name}.jsonl").read_text().splitlines()
        (tmp_path / "events" / f"{command.name}.jsonl").write_text(lines[1] + "\n")
    assert [command.state for command in read_story(tmp_path).commands] == ["lost", "running"]


def test_the_verb_prints_every_command_and_what_became_of_it(eventful: Path, capsys: pytest.CaptureFixture[str]):
    assert run_command(["story", str(eventful)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "vanished after 1 min 32 s",
        "failed after 1 min 11 s, exit code 1",
        "done in 1 min 42 s",
        "(2 h 58 min later)",
        "done, continued",
        "train failed: it diverges",
        "there is little text",
        "3 commands, 4 min 25 s at work, 3 worker deaths, 1 warning",
    ):
        assert words in shown, shown
    assert all(line.startswith(str(eventful)) for line in shown.splitlines() if len(line) > 100)


def test_json_holds_the_same(eventful: Path, capsys: pytest.CaptureFixture[str]):
    assert run_command(["story", str(eventful), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["seconds"] == 92 + 71 + 102
    assert [command["state"] for command in told["commands"]] == ["lost", "failed", "done"]
    assert told["commands"][0]["stages"][0]["tokens_per_second"] == 100


def test_a_directory_without_events_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run_command(["story", str(tmp_path)]) == 1
    assert "has no events" in capsys.readouterr().err


def test_a_uri_that_nothing_opens_is_refused(capsys: pytest.CaptureFixture[str]):
    assert run_command(["story", "nowhere://bucket/run"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_timeline_has_a_row_a_stage_and_a_bar_each_time(eventful: Path, monkeypatch: pytest.MonkeyPatch):
    figures: list[Figure] = []
    monkeypatch.setattr(plot_style, "save", lambda figure, path: figures.append(figure))
    plot_story(read_story(eventful), Path("timeline.png"))
    [axes] = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["collect", "precompute", "train"]
    bars = [(patch.get_y() + patch.get_height() / 2, patch.get_width() * 60) for patch in axes.patches[:]]
    bars = [(round(row), round(width)) for row, width in bars if width > 0 and row == round(row)]
    assert [bar for bar in bars if bar[1] in (60, 30, 37, 100)] == [(0, 60), (1, 30), (1, 30), (2, 37), (2, 100)]
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert {"done", "failed", "the command vanished", "worker died", "warning", "checkpoint"} <= set(legend)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_timeline_is_written(eventful: Path, suffix: str, capsys: pytest.CaptureFixture[str]):
    path = eventful / f"timeline.{suffix}"
    assert run_command(["story", str(eventful), "--plot", str(path)]) == 0
    assert path.stat().st_size > 10_000


def test_a_story_without_a_stage_has_no_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Command(tmp_path, 1).add(1, "end", exit_code=0)
    assert run_command(["story", str(tmp_path), "--plot", str(tmp_path / "t.png")]) == 2
    assert "no command has worked at a stage" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.2 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599.7, "1 h 0 min"), (90061, "1 d 1 h"), (59.9, "60 s")],
)
def test_lengths_of_time_are_in_two_units(seconds: float, words: str):
    assert duration(seconds) == words


def test_moments_and_sizes():
    assert [clock(moment) for moment in (0, 75.9, 3661)] == ["0:00", "1:15", "1:01:01"]
    assert [size(count) for count in (12, 2048, 3 * 2**30)] == ["12 B", "2.0 KiB", "3.0 GiB"]
