"""What a command tells of itself: how it was called, its warnings, its end with the exit code that the shell gets."""

from __future__ import annotations

import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nexus_ray import pipeline
from nexus_ray.cli import run_command
from nexus_ray.config import Config, load_config
from nexus_ray.errors import ConfigError, NexusError
from nexus_ray.observing import command, origin, record, telling, telling_from, telling_stage
from nexus_ray.observing.command import exit_code, record_signal
from nexus_ray.observing.event_files import Event, read_events
from nexus_ray.observing.story import tell

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
TRACKER = "http://bob:hunter2@tracker:5000"


def demo(directory: Path, *overrides: str) -> Config:
    return load_config(DEMO, [f"run.directory={directory}", *overrides])


def of_kind(directory: Path, kind: str) -> list[Event]:
    return [event for event in read_events(directory) if event["event"] == kind]


def test_a_command_tells_how_it_was_called_and_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["nexus-ray", "run", "a.yaml", f"train.trackers.mlflow.tracking_uri={TRACKER}"])
    with telling(tmp_path, demo(tmp_path, f"train.trackers.mlflow.tracking_uri={TRACKER}")):
        logging.getLogger("nexus_ray.anything").warning("MLflow at %s is away", TRACKER)
        logging.getLogger("nexus_ray.anything").info("not worth an event")
    first, warning, end = read_events(tmp_path)
    assert (first["event"], warning["event"], end["event"]) == ("command", "warning", "end")
    assert first["argv"][:3] == ["nexus-ray", "run", "a.yaml"]
    assert first["versions"]["ray"]
    assert len(first["config"]) == 64
    assert warning["message"] == "MLflow at *** is away"
    assert (end["exit_code"], end["seconds"]) == (0, pytest.approx(end["offset"], abs=0.1))
    text = "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))
    assert "hunter2" not in text
    assert "tracker:5000" not in text


def test_the_digest_tells_configurations_apart_but_not_where_their_trackers_are(tmp_path: Path):
    for overrides in ((), ("train.steps=3",), (f"train.trackers.mlflow.tracking_uri={TRACKER}",)):
        with telling(tmp_path, demo(tmp_path, *overrides)):
            pass
    plain, other, tracked = (event["config"] for event in of_kind(tmp_path, "command"))
    assert plain == tracked != other


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (None, 0),
        (NexusError("no"), 1),
        (ConfigError("no"), 2),
        (KeyboardInterrupt(), 130),
        (SystemExit(signal.SIGTERM), 130),
        (SystemExit(3), 3),
    ],
)
def test_the_exit_code_is_the_one_that_the_shell_gets(
    raised: BaseException | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(*_: Any, **__: Any) -> None:
        with telling(tmp_path):
            if raised is not None:
                raise raised

    monkeypatch.setattr(pipeline, "run_single_stage", run)
    assert run_command(["select", str(DEMO), f"run.directory={tmp_path}"]) == code
    [end] = of_kind(tmp_path, "end")
    assert end["exit_code"] == exit_code(raised) == code
    assert end.get("error") == (None if raised is None else type(raised).__name__)


def test_a_defect_is_told_as_a_failure(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), telling(tmp_path):
        _ = 1 / 0
    assert of_kind(tmp_path, "end")[0]["exit_code"] == exit_code(ZeroDivisionError()) == 1


def test_a_stop_is_told_once_with_its_signal(tmp_path: Path):
    def stop() -> None:
        record_signal(signal.SIGTERM)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), telling(tmp_path):
        stop()
    with pytest.raises(KeyboardInterrupt), telling(tmp_path):
        raise KeyboardInterrupt
    assert [event["signal"] for event in of_kind(tmp_path, "stop_signal")] == ["SIGTERM", "SIGINT"]


def test_a_stage_tells_what_it_did_and_how_it_ended(tmp_path: Path):
    with telling(tmp_path):
        with telling_stage("collect", "r") as tally:
            tally.tokens, tally.bytes = 1000, 77
        with pytest.raises(NexusError), telling_stage("train", "t", continued=True):
            raise NexusError("it diverges", "lower the rate")
        with pytest.raises(KeyboardInterrupt), telling_stage("train", "t", continued=True):
            raise KeyboardInterrupt
    stages = [event for event in read_events(tmp_path) if event["event"].startswith("stage_")]
    kinds = ["started", "done", "continued", "failed", "continued", "stopped"]
    assert [event["event"] for event in stages] == [f"stage_{kind}" for kind in kinds]
    assert stages[1].items() >= {"stage": "collect", "recipe": "r", "tokens": 1000, "bytes": 77}.items()
    assert stages[1]["tokens_per_second"] > 0
    assert stages[3]["message"].startswith("it diverges")


def test_signs_of_life_say_how_long_a_command_lived_that_could_not_say_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "_ALIVE_SECONDS", 0.01)
    with telling(tmp_path):
        deadline = time.monotonic() + 30
        while len(of_kind(tmp_path, "alive")) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        killed = read_events(tmp_path)
    assert killed[-1]["event"] == "alive"
    [told] = tell(killed)
    assert told.seconds >= killed[-1]["offset"] > 0


def test_events_jsonl_is_there_when_a_stage_has_ended(tmp_path: Path):
    with telling(tmp_path):
        with telling_stage("collect"):
            pass
        assert '"stage_done"' in (tmp_path / "events.jsonl").read_text()


def test_a_worker_tells_in_a_file_of_its_own(tmp_path: Path):
    with telling(tmp_path, demo(tmp_path, f"train.trackers.mlflow.tracking_uri={TRACKER}")):
        told = origin()
    record("nothing")  # no command tells now
    with telling_from(told, "training worker"):
        record("checkpoint", step=4, where=TRACKER)
    [checkpoint] = of_kind(tmp_path, "checkpoint")
    assert checkpoint["process"] == "training worker"
    assert checkpoint["command"] == of_kind(tmp_path, "command")[0]["command"]
    assert checkpoint["where"] == "***"
    assert not of_kind(tmp_path, "nothing")
    assert len(list((tmp_path / "events").iterdir())) == 2


def test_a_worker_that_has_nothing_to_say_leaves_no_file(tmp_path: Path):
    with telling(tmp_path), telling_from(origin(), "training worker"):
        pass
    assert len(list((tmp_path / "events").iterdir())) == 1


def test_a_command_in_a_command_is_part_of_it(tmp_path: Path):
    with telling(tmp_path), telling(tmp_path / "other"):
        record("inside")
    assert [event["event"] for event in read_events(tmp_path)] == ["command", "inside", "end"]
    assert not (tmp_path / "other").exists()


def test_a_run_goes_on_where_nothing_can_be_written(tmp_path: Path, warned: list[str]):
    (tmp_path / "events").write_text("a file stands where the directory should be")
    with telling(tmp_path), telling_stage("collect"):
        pass
    assert warned
    assert all("the run goes on" in message for message in warned)
    assert len(warned) <= 2, "one for the record, one for the joined file"


def test_a_refused_command_is_told_too(tmp_path: Path):
    config = demo(tmp_path / "run")
    with (
        pipeline.locked(pipeline.RunLayout(config.run.directory)),
        pytest.raises(NexusError, match="another nexus-ray"),
    ):
        pipeline.run_pipeline(config)
    [end] = of_kind(config.run.directory, "end")
    assert end["exit_code"] == 1
    assert "another nexus-ray is working" in end["message"]
