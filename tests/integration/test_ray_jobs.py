"""`ray job submit` and `ray job stop`: what was stopped continues, two of the same run do not mix, a lost head costs no
finished work.
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed_commands import PATIENCE_SECONDS, start_stage
from private_cluster import PrivateCluster, free_ports, wait_until

from nexus_ray.config import Config, save_config
from nexus_ray.layout import RunLayout
from nexus_ray.router.collect import collect
from nexus_ray.storage import sha256_file
from nexus_ray.targets.writing import precompute
from nexus_ray.training.recovery import steps_reached
from nexus_ray.training.watching.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
_SMALL_UNITS = {"collect.batch_sequences": 1, "collect.unit_batches": 1, "collect.tokens": 8192}
_TRAINING: dict[str, Any] = {
    "train.mode": "online",
    "train.steps": 400,
    "train.checkpoint_every": 1000,  # none but the one of the stop
    "train.validate_every": 400,
    "resources.workers": 1,
}
_WORKERS = ("MapWorker", "RayTrainWorker", "jobs/")  # and the driver


def saved(config: Config, path: Path) -> Path:
    save_config(config, path)
    return path


def parts(layout: RunLayout) -> int:
    return len(list((layout.directory / "router_stats.partial").glob("unit-*.safetensors")))


def digests(layout: RunLayout) -> list[str]:
    files = (layout.router_stats, layout.calibration)
    return [sha256_file(path) for file in files for path in (file, file.with_suffix(".json"))]


@pytest.mark.usefixtures("in_process")
def test_a_stopped_job_continues_when_it_is_submitted_again_and_a_second_one_is_refused(make_micro_config, tmp_path):
    config = make_micro_config(tmp_path / "run", **_SMALL_UNITS)
    path, layout = saved(config, tmp_path / "run.yaml"), RunLayout(config.run.directory)
    arguments = (path, "--until", "collect")
    with PrivateCluster() as cluster:
        first = cluster.submit("pipeline", *arguments)
        cluster.wait_for(first, lambda: parts(layout) >= 3, "the first parts")
        for worker in cluster.processes("MapWorker"):
            worker.suspend()  # the stage is in its middle, and stays there
        left = parts(layout)

        second = cluster.submit("pipeline", *arguments)
        assert cluster.wait_for_end(second) == "FAILED"
        assert f"another nexus-ray is working in {layout.directory}" in cluster.message(second)
        assert "Traceback" not in cluster.message(second)

        cluster.stop(first)
        assert cluster.status(first) == "STOPPED"
        assert cluster.log(first)[-1] == "interrupted; the same command continues where this one stopped"
        wait_until(lambda: not cluster.processes(*_WORKERS), "no worker and no driver stays behind")
        assert left <= parts(layout)
        assert not layout.router_stats.exists()

        again = cluster.submit("pipeline", *arguments)
        assert cluster.wait_for_end(again) == "SUCCEEDED", cluster.log(again)
        log = cluster.log(again)
        wait_until(lambda: not cluster.processes(*_WORKERS), "no worker and no driver stays behind")

    assert any("continuing: " in line for line in log), "what was done is not done again"
    assert log[-2] == f"done: router_stats {layout.router_stats}"
    assert json.loads(log[-1]) == {"done": "run", "artefacts": {"router_stats": str(layout.router_stats)}}
    assert not any("Traceback" in line for line in log)

    undisturbed = make_micro_config(tmp_path / "undisturbed", **_SMALL_UNITS)
    whole = RunLayout(undisturbed.run.directory)
    collect(undisturbed, whole)
    assert digests(layout) == digests(whole)


@pytest.fixture
def training(make_micro_config, micro_overlay, tmp_path, monkeypatch) -> Callable[[str], Path]:
    """A function (name) -> configuration file of a run that has everything but its training."""
    monkeypatch.setattr(
        precompute, "map_over_pool", lambda worker, arguments, items, *_: map(worker(**arguments), items)
    )

    def make(name: str) -> Path:
        config = make_micro_config(tmp_path / name, **_TRAINING)
        layout = RunLayout(config.run.directory)
        precompute.precompute_run(config, layout)
        shutil.copytree(micro_overlay, layout.initial_overlay)
        return saved(config, tmp_path / f"{name}.yaml")

    return make


def steps_taken(layout: RunLayout) -> int:
    return max((record["step"] + 1 for record in read_metrics(layout.metrics)), default=0)


def resumed_at(layout: RunLayout) -> list[int]:
    """Steps that were done whenever a training went on."""
    return [record["step"] for record in read_metrics(layout.metrics) if record["event"] == "resume"]


@pytest.mark.slow
def test_a_stopped_training_has_a_checkpoint_of_its_last_step_and_a_lost_cluster_costs_no_more_than_that(
    training, tmp_path
):
    path, layout = training("run"), RunLayout(tmp_path / "run")
    with PrivateCluster() as cluster:
        job = cluster.submit("train", path)
        cluster.wait_for(job, lambda: steps_taken(layout) >= 5, "the first steps")
        cluster.stop_at_once(job)
        assert cluster.wait_for_end(job) == "STOPPED"
        assert any(line.endswith("the checkpoint is written") for line in cluster.log(job)), cluster.log(job)
        reached = steps_reached(layout.checkpoints)
        assert 5 <= reached < _TRAINING["train.steps"]
        wait_until(lambda: not cluster.processes(*_WORKERS), "no worker and no driver stays behind")

        again = cluster.submit("train", path)
        gets_on = lambda: resumed_at(layout) and steps_taken(layout) >= reached + 5  # noqa: E731
        cluster.wait_for(again, gets_on, "steps after the checkpoint")
    assert not layout.overlay.exists()
    with PrivateCluster() as cluster:  # the one before was killed, head and all
        job = cluster.submit("train", path)
        assert cluster.wait_for_end(job) == "SUCCEEDED", cluster.log(job)
    assert resumed_at(layout) == [reached, reached]

    log = tmp_path / "log.txt"
    assert start_stage("train", training("whole"), log).wait(PATIENCE_SECONDS) == 0, log.read_text()
    assert overlay_digests(layout) == overlay_digests(RunLayout(tmp_path / "whole"))


def overlay_digests(layout: RunLayout) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(layout.overlay.iterdir())}


@pytest.mark.slow
def test_a_service_is_up_until_its_job_is_stopped(make_micro_config, micro_overlay, tmp_path):
    [port] = free_ports(1)
    config = make_micro_config(tmp_path / "run", **{"serve.port": port})
    shutil.copytree(micro_overlay, RunLayout(config.run.directory).overlay)
    path, address = saved(config, tmp_path / "run.yaml"), f"http://127.0.0.1:{port}/healthz"
    with PrivateCluster() as cluster:
        job = cluster.submit("serve", path)
        cluster.wait_for(job, lambda: answers(address), "the service answers")
        cluster.stop(job)
        assert cluster.status(job) == "STOPPED"
        wait_until(lambda: not cluster.processes("ServeReplica", "ServeController", "ProxyActor"), "Serve is gone")
        assert not answers(address)
        assert any(line.endswith("stopping the service") for line in cluster.log(job)), cluster.log(job)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False
