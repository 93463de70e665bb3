"""metrics.jsonl holds each step once, whatever was killed while writing it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nexus_ray.errors import StorageError
from nexus_ray.training.watching.metrics import MetricsLog, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def run(path: Path, first: int, last: int) -> None:
    log = MetricsLog(path, first)
    for step in range(first, last):
        log.write("step", step, loss=float(step))


def test_records_come_back_as_written(path):
    log = MetricsLog(path, 0)
    log.write("step", 0, loss=0.1, tokens=7)
    log.write("validation", 0, losses={"play": 3.5}, samples=["é\n"])
    assert read_metrics(path) == [
        {"event": "step", "step": 0, "loss": 0.1, "tokens": 7},
        {"event": "validation", "step": 0, "losses": {"play": 3.5}, "samples": ["é\n"]},
    ]


def test_a_record_is_on_disk_when_write_returns(path):
    log = MetricsLog(path, 0)
    for step in range(3):
        log.write("step", step)
        assert len(read_metrics(path)) == step + 1


def test_no_file_holds_no_records(path):
    assert read_metrics(path) == []


@pytest.mark.parametrize("kept", range(1, 30, 4))
def test_a_cut_last_line_is_ignored(path, kept):
    run(path, 0, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:kept])
    assert [record["step"] for record in read_metrics(path)] == [0, 1]


def test_a_resumed_run_drops_the_steps_it_takes_again(path):
    run(path, 0, 10)
    run(path, 6, 8)
    records = read_metrics(path)
    assert [record["step"] for record in records] == list(range(8))


def test_a_resumed_run_continues_after_a_cut_line(path):
    run(path, 0, 3)
    path.write_bytes(path.read_bytes()[:-5])
    run(path, 3, 5)
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 3, 4]
    assert path.read_text().count("\n") == 4


def test_every_event_of_a_dropped_step_goes_except_resumes(path):
    log = MetricsLog(path, 0)
    for event in ("step", "validation", "checkpoint", "best", "resume"):
        log.write(event, 5)
    MetricsLog(path, 5)
    assert [record["event"] for record in read_metrics(path)] == ["resume"]


def test_a_new_run_starts_empty(path):
    run(path, 0, 3)
    MetricsLog(path, 0)
    assert read_metrics(path) == []


def test_a_full_disk_is_told(path, monkeypatch):
    log = MetricsLog(path, 0)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError, match="disk is full"):
        log.write("step", 0)
