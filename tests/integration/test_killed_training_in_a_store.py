"""Training whose run directory is a URI, on Ray: killed, it ends with the overlay of one on a disk that was not."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from object_store import ObjectStore

from nexus_ray.config import Config
from nexus_ray.errors import ArtefactError
from nexus_ray.layout import RunLayout
from nexus_ray.pipeline import run_single_stage
from nexus_ray.storage import Place, atomic_directory, local_directory, sha256_file
from nexus_ray.targets.writing import precompute
from nexus_ray.training.distil import train
from nexus_ray.training.recovery import steps_reached
from nexus_ray.training.watching.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]
SETTINGS: dict[str, object] = {
    "train.steps": 40,
    "train.checkpoint_every": 5,
    "train.validate_every": 20,
    "train.micro_batch_sequences": 8,
    "train.averaging": {"every": 9, "anchor": "initial"},
}
Prepared = Callable[..., Config]


@pytest.fixture
def prepared(make_micro_config, micro_model, write_overlay, ray_session, object_store, monkeypatch) -> Prepared:
    """A function (directory, **overrides) -> configuration of a run that has everything but its training."""

    def make(directory: Place, **overrides: object) -> Config:
        config: Config = make_micro_config(directory, **{**SETTINGS, **overrides})
        layout = RunLayout(config.run.directory)
        with monkeypatch.context() as patch:
            here = lambda worker, arguments, items, *_: map(worker(**arguments), items)  # noqa: E731
            patch.setattr(precompute, "map_over_pool", here)
            precompute.precompute_run(config, layout)
        write_overlay(micro_model, layout.initial_overlay, width=64, std=0.2, token_gate=True, scale=0.5, seed=1)
        return config

    return make


def overlay(layout: RunLayout) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(local_directory(layout.overlay).iterdir())}


def losses(layout: RunLayout) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(layout.metrics) if record["event"] == "step"]


def kill_a_worker_after(steps: int, layout: RunLayout, killed: list[int], ended: threading.Event) -> None:
    while steps_reached(layout.checkpoints) < steps:
        if ended.wait(0.05):
            return
    for process in psutil.Process().children(recursive=True):
        if any("RayTrainWorker" in part for part in process.cmdline()[:1]):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
            return


def test_a_worker_killed_once_on_a_uri_ends_with_the_overlay_of_an_undisturbed_training_on_a_disk(
    prepared: Prepared, object_store: ObjectStore, remote: Place, tmp_path: Path, caplog, monkeypatch
):
    local, stored = prepared(tmp_path / "run"), prepared(remote / "run")
    run_single_stage(local, "train")
    monkeypatch.setattr(logging.getLogger("nexus_ray"), "propagate", True)
    caplog.set_level(logging.INFO, logger="nexus_ray")
    layout, killed, ended = RunLayout(stored.run.directory), list[int](), threading.Event()
    killer = threading.Thread(target=kill_a_worker_after, args=(5, layout, killed, ended), daemon=True)
    killer.start()
    try:
        with object_store.refusing_every(15):
            run_single_stage(stored, "train")
    finally:
        ended.set()
        killer.join()
    assert killed
    assert object_store.failed
    assert [record["event"] for record in read_metrics(layout.metrics)].count("resume") == 1
    assert overlay(layout) == overlay(RunLayout(local.run.directory))
    assert losses(layout) == losses(RunLayout(local.run.directory))
    assert "step 40: validation loss" in caplog.text, "the driver is told while training goes on"
    assert not list(Path().glob("s3:*")), "nothing takes the URI for a path"


def test_the_error_that_ends_a_training_on_a_uri_reaches_the_driver_in_words(prepared: Prepared, remote: Place):
    config = prepared(remote / "run")
    layout = RunLayout(config.run.directory)
    with atomic_directory(layout.checkpoints / "step-00000005") as directory:
        (directory / "state.json").write_text("{")
    with pytest.raises(ArtefactError, match="no checkpoint of this training is whole") as caught:
        train(config, layout)
    assert str(layout.checkpoints / "step-00000005") in caught.value.message
