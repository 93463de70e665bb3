"""Events are whole lines in order, whatever is killed, full, concurrent or set back."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from observing.made_events import NOON, Command

from nexus_ray.observing import event_files, events
from nexus_ray.observing.event_files import file_of_command, join, new_command, read_events
from nexus_ray.observing.events import EventFile
from nexus_ray.observing.secrets import hiding
from nexus_ray.storage import Place, place_of


def open_file(directory: Place, secrets: tuple[str, ...] = ()) -> EventFile:
    command = new_command(directory)
    return EventFile(file_of_command(directory, command), {"command": command}, hiding(secrets, {}))


@pytest.fixture
def bucket() -> Place:
    """A directory of an object store, in memory."""
    place = place_of(f"memory://events-{time.monotonic_ns()}/run")
    assert not isinstance(place, Path)
    return place


def names(directory: Place) -> list[str]:
    return [event["event"] for event in read_events(directory)]


@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_every_event_is_one_line_with_number_time_and_offset(where: str, tmp_path: Path, bucket: Place):
    directory = tmp_path if where == "disk" else bucket
    file = open_file(directory)
    for number in range(3):
        file.write("step", number=number, text="two\nlines", loss=float("nan"))
    file.close()
    [path] = list((directory / "events").iterdir())
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [(line["seq"], line["number"]) for line in lines] == [(0, 0), (1, 1), (2, 2)]
    assert all(line["event"] == "step" and line["time"].endswith("Z") and line["offset"] >= 0 for line in lines)
    assert {line["loss"] for line in lines} == {"nan"}


def test_a_run_on_an_object_store_is_readable_while_it_goes_on(bucket: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(events, "_UPLOAD_SECONDS", 0.05)
    monkeypatch.setattr(events, "_POLL_SECONDS", 0.01)
    file = open_file(bucket)
    file.write("first")
    deadline = time.monotonic() + 30
    while names(bucket) != ["first"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert names(bucket) == ["first"]
    file.write("second")
    file.close()
    assert names(bucket) == ["first", "second"]


def test_objects_are_not_written_at_every_event(bucket: Place, monkeypatch: pytest.MonkeyPatch):
    written: list[int] = []
    real = type(bucket).write_bytes
    monkeypatch.setattr(type(bucket), "write_bytes", lambda self, data: written.append(1) or real(self, data))
    file = open_file(bucket)
    for _ in range(500):
        file.write("step")
    file.close()
    assert len(written) <= 3
    assert len(names(bucket)) == 500


def _tell_much(directory: Path, ready: Any) -> None:
    file = open_file(directory)
    ready.wait()
    for number in range(300):
        file.write("step", number=number, filling="x" * 200)
    file.close()


def test_concurrent_commands_do_not_touch_each_other_s_record(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(4)
    processes = [context.Process(target=_tell_much, args=(tmp_path, ready)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert len(list((tmp_path / "events").iterdir())) == 4
    join(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 300
    for command in {line["command"] for line in lines}:
        assert [line["number"] for line in lines if line["command"] == command] == list(range(300))


def test_a_line_that_a_kill_has_cut_is_left_out_and_nothing_else(tmp_path: Path):
    first = Command(tmp_path, 1)
    first.add(1, "whole")
    path = tmp_path / "events" / f"{first.name}.jsonl"
    with path.open("ab") as file:
        file.write(b'{"command": "0001-')
    Command(tmp_path, 2).add(1, "later")
    assert names(tmp_path) == ["command", "whole", "command", "later"]


def test_after_a_full_disk_it_goes_on_with_whole_lines_and_has_warned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]
):
    file = open_file(tmp_path)
    file.write("before")
    real, room = os.write, [40]

    def write(descriptor: int, data: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[: room.pop()])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        file.write("cut")
        file.write("lost")
    file.write("after")
    file.close()
    assert names(tmp_path) == ["before", "after"]
    assert len(warned) == 1
    assert "the disk is full; the run goes on" in warned[0]


def test_a_directory_that_cannot_be_written_ends_nothing(tmp_path: Path, warned: list[str]):
    (tmp_path / "events").write_text("a file stands where the directory should be")
    command = event_files.name_command(1)
    file = EventFile(file_of_command(tmp_path, command), {"command": command}, hiding())
    file.write("one")
    file.write("two")
    file.close()
    assert len(warned) == 1


def test_a_signal_handler_may_write_whatever_it_interrupts(tmp_path: Path):
    file = open_file(tmp_path)
    before = signal.signal(signal.SIGALRM, lambda *_: file.write("signal"))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        for _ in range(2000):
            file.write("step", filling="x" * 500)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    file.close()
    found = read_events(tmp_path)
    assert [event["seq"] for event in found] == list(range(len(found)))
    assert sum(event["event"] == "step" for event in found) == 2000
    assert any(event["event"] == "signal" for event in found)


def test_threads_share_one_file(tmp_path: Path):
    file = open_file(tmp_path)
    threads = [threading.Thread(target=lambda: [file.write("step") for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file.close()
    assert [event["seq"] for event in read_events(tmp_path)] == list(range(800))


def test_commands_stand_in_their_order_although_the_clock_was_set_back(tmp_path: Path):
    Command(tmp_path, 1, NOON).add(5, "first")
    Command(tmp_path, 2, NOON - timedelta(days=400)).add(5, "second")
    assert [name for name in names(tmp_path) if name != "command"] == ["first", "second"]
    assert new_command(tmp_path).startswith("0003-")


def test_events_of_one_command_stand_in_their_order_although_the_clock_jumps(tmp_path: Path):
    command = Command(tmp_path, 1)
    command.add(1, "a")
    command.add(2, "b", clock=-3600)
    command.add(3, "c", clock=7200)
    assert names(tmp_path) == ["command", "a", "b", "c"]


def test_a_worker_s_events_stand_where_its_clock_says_but_within_its_command(tmp_path: Path):
    """It was asked for after 10 s; one worker's clock is right, one is an hour behind, one an hour ahead."""
    command = Command(tmp_path, 1)
    command.add(12, "before")
    for name, wrong in (("right", 15), ("behind", -3600), ("ahead", 3600)):
        command.add(0, f"{name}-begins", of=name, after=10.0, clock=wrong)
        command.add(2, f"{name}-ends", of=name, after=10.0, clock=wrong)
    command.add(30, "end", exit_code=0)
    moments = {event["event"]: event["moment"] for event in read_events(tmp_path)}
    assert (moments["right-begins"], moments["right-ends"]) == (15, 17)
    assert (moments["behind-begins"], moments["behind-ends"]) == (10, 12)
    assert (moments["ahead-begins"], moments["ahead-ends"]) == (28, 30)
    assert names(tmp_path)[-1] == "end"


def test_the_joined_file_tells_the_same_where_only_it_was_kept(tmp_path: Path):
    command = Command(tmp_path, 1)
    command.add(1, "a")
    command.add(0, "b", of="w", after=0.0, clock=0.5)
    join(tmp_path)
    before = read_events(tmp_path)
    for path in (tmp_path / "events").iterdir():
        path.unlink()
    assert read_events(tmp_path) == before
    assert [event["event"] for event in before] == ["command", "b", "a"]
