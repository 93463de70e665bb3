"""Links to Ray's dashboard: said once where there is one, and what a submitted job is known by."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from nexus_ray.observing import links, telling
from nexus_ray.observing.event_files import read_events

_FRONT_END = Path(ray.__file__).parent / "dashboard" / "client" / "build" / "static" / "js"


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of two nodes, one of them gone."""
    context = SimpleNamespace(get_job_id=lambda: "02000000")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": False}])
    monkeypatch.setattr(links, "_dashboard", "")


def context(dashboard: str) -> Any:
    return SimpleNamespace(dashboard_url=dashboard, address_info={"gcs_address": "10.0.0.1:6379"})


@pytest.mark.usefixtures("connected")
def test_the_job_s_page_is_logged_and_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("nexus_ray"), "propagate", True)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "raysubmit_7"}}))
    with telling(tmp_path), caplog.at_level(logging.INFO, "nexus_ray"):
        links.tell_ray(context("10.0.0.1:8265"))
    # A set: after a test of the command line the record reaches pytest's handler by two ways.
    assert {record.getMessage() for record in caplog.records} == {"dashboard: http://10.0.0.1:8265/#/jobs/02000000"}
    [event] = [event for event in read_events(tmp_path) if event["event"] == "ray"]
    told = {"job": "02000000", "submission": "raysubmit_7", "nodes": 1, "cpus": 8.0, "gpus": 1.0}
    assert event.items() >= (told | {"dashboard": "http://10.0.0.1:8265/#/jobs/02000000"}).items()


@pytest.mark.usefixtures("connected")
def test_without_a_dashboard_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with telling(tmp_path), caplog.at_level(logging.INFO, "nexus_ray"):
        links.tell_ray(context(""))
        links.tell_training()
    assert not caplog.records
    assert "dashboard" not in next(event for event in read_events(tmp_path) if event["event"] == "ray")


def test_ray_train_s_runs_are_linked_where_ray_keeps_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(links, "_dashboard", "http://head:8265")
    for tracking in ("0", "1"):
        monkeypatch.setenv("RAY_TRAIN_ENABLE_STATE_TRACKING", tracking)
        with telling(tmp_path / tracking):
            links.tell_training()
    found = [event for event in read_events(tmp_path / "1") if event["event"] == "train_view"]
    assert [event["dashboard"] for event in found] == ["http://head:8265/api/train/v2/runs/v1"]
    assert not [event for event in read_events(tmp_path / "0") if event["event"] == "train_view"]


def test_ray_s_front_end_has_the_page_that_is_linked():
    [script] = _FRONT_END.glob("main.*.js")
    assert '"/jobs/".concat(e.job_id)' in script.read_text()


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("127.0.0.1:8265", "http://127.0.0.1:8265"),
        ("https://ray.example/", "https://ray.example"),
        ("", ""),
        (None, ""),
    ],
)
def test_addresses_get_a_scheme(given: str | None, address: str):
    assert links.address(given) == address


@pytest.mark.parametrize("value", ["no json", "{}", '{"metadata": {}}'])
def test_a_command_that_was_not_submitted_has_no_submission(value: str):
    assert links.submission_of({"RAY_JOB_CONFIG_JSON_ENV_VAR": value}) == ""
