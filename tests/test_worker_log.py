"""Of all that workers print, the driver's log has their warnings, once, with node and stage."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from nexus_ray import worker_log
from nexus_ray.worker_log import Listener, are_ready, expect_workers, ready, speak_as, what_workers_do


@pytest.fixture(autouse=True)
def _root_as_it_was():
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers = handlers
    expect_workers()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("nexus_ray"), "propagate", True)
    caplog.set_level(logging.INFO, logger="nexus_ray")
    return caplog


def brought_by_ray(lines: list[str], pid: object = 41, ip: str = "10.0.0.7") -> dict[str, Any]:
    return {"pid": pid, "ip": ip, "lines": lines, "is_err": True}


def no_events(lines: list[str]) -> list[str]:
    raise AssertionError


def said_by_worker(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_warning_arrives_with_its_stage_and_node(log, capsys):
    speak_as("collect")
    logging.getLogger("nexus_ray.data.unreadable").warning("3 rows left out\nthe first: %s", "{")
    logging.getLogger("nexus_ray.data.unreadable").info("no news")
    logging.getLogger("urllib3").warning("other libraries' warnings are not for people")
    logging.getLogger("urllib3").error("their errors are")
    lines = said_by_worker(capsys)
    log.clear()
    Listener(no_events)(brought_by_ray([*lines, "something printed"]))
    assert [(record.levelname, record.message) for record in log.records] == [
        ("WARNING", "collect, worker on 10.0.0.7: 3 rows left out\nthe first: {"),
        ("ERROR", "collect, worker on 10.0.0.7: their errors are"),
    ]


def test_what_all_workers_say_is_said_once(log, capsys, monkeypatch):
    speak_as("collect")
    logging.getLogger("nexus_ray").warning("slow disk")
    lines = said_by_worker(capsys)
    log.clear()
    listener, now = Listener(no_events), [0.0]
    monkeypatch.setattr(worker_log, "monotonic", lambda: now[0])
    for node in ("10.0.0.7", "10.0.0.8"):
        listener(brought_by_ray(lines, ip=node))
    assert len(log.records) == 1
    now[0] = 61.0
    listener(brought_by_ray(lines, ip="10.0.0.9"))
    assert len(log.records) == 2, "after a minute it is news again"


def test_workers_tell_how_far_they_are(capsys):
    listener = Listener(no_events)
    expect_workers()
    assert what_workers_do("each needs CPU 1") == "no worker has started yet, each needs CPU 1"
    speak_as("train")
    listener(brought_by_ray(said_by_worker(capsys)))
    assert what_workers_do("") == "workers are loading"
    assert not are_ready()
    ready()
    listener(brought_by_ray(said_by_worker(capsys)))
    assert what_workers_do("") == "workers are at work"
    assert are_ready()


def test_other_lines_go_to_rays_own_printer_where_there_is_one(capsys):
    speak_as("train")
    printed: list[Any] = []
    Listener(no_events, [printed.append])(brought_by_ray([*said_by_worker(capsys), "NCCL version 2.29"]))
    assert [data["lines"] for data in printed] == [["NCCL version 2.29"]]


def test_events_of_the_autoscaler_are_told_without_advertising(log):
    lines = ["raw"]
    Listener(lambda seen: ["Tip: use `ray status`", f"Adding 2 nodes ({seen[0]})"])(brought_by_ray(lines, "autoscaler"))
    assert [record.message for record in log.records] == ["cluster: Adding 2 nodes (raw)"]


def test_a_worker_that_died_is_told_and_one_that_was_ended_is_not(log):
    events = [
        "Task collect failed. There are 3 retries remaining. Error: The actor died unexpectedly: killed by SIGKILL",
        "Task collect failed, to be retried. Error: The actor is dead because it was killed by `ray.kill`.",
        "[2026-11-22 21:45:02,347 I 20316 20316] logging.cc:303: Set ray log level from environment variable",
    ]
    Listener(no_events)(brought_by_ray(events, "raylet"))
    assert [record.message for record in log.records] == [f"cluster: {events[0]}"]


def test_a_garbled_line_does_not_end_rays_thread():
    Listener(no_events)(brought_by_ray([":nexus-ray:{not json"]))
    Listener(no_events)({})
