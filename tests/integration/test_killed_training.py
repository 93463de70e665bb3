"""Training that is killed in any way ends with the same bytes as training that is not, on any number of workers.

The run has all that must be continued: a warm-up, merges with an anchor, a router bias that freezes, accumulation,
and three workers: sums of two numbers do not depend on their order.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from killed_commands import PATIENCE_SECONDS, kill_with_everything_it_started, start_stage

from nexus_ray.config import Config, load_config, save_config
from nexus_ray.errors import ConfigError
from nexus_ray.layout import RunLayout
from nexus_ray.pipeline import run_single_stage
from nexus_ray.storage import sha256_file
from nexus_ray.targets.writing import precompute
from nexus_ray.training.recovery import steps_reached
from nexus_ray.training.watching.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
STEPS, INTERRUPTED = 60, 130
SETTINGS: dict[str, object] = {
    "resources.workers": 3,
    "train.steps": STEPS,
    "train.checkpoint_every": 7,
    "train.validate_every": 20,
    "train.micro_batch_sequences": 1,
    "train.mode": "online",
    "train.optimiser.schedule": {"warmup": 0.4, "decay": 0.3},
    "train.averaging": {"every": 9, "anchor": "previous"},
    "train.routers": {"train": "bias", "bias_learning_rate_factor": 0.1, "freeze_bias_at": 0.5},
    "train.sources.play.router_kl": [[0, 0], [0.5, 1]],
}
MakeRun = Callable[..., Config]


@pytest.fixture(scope="module")
def make_run(make_micro_config, micro_overlay, tmp_path_factory) -> MakeRun:
    """A function (name, **overrides) -> configuration of a run that has everything but its training."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompute, "map_over_pool", lambda worker, arguments, items, *_: map(worker(**arguments), items))
        config = make_micro_config(root / "prepared", **SETTINGS)
        precompute.precompute_run(config, RunLayout(config.run.directory))

    def make(name: str, **overrides: object) -> Config:
        made = make_micro_config(root / name, **{**SETTINGS, **overrides})
        layout = RunLayout(made.run.directory)
        shutil.copytree(root / "prepared", layout.directory)
        shutil.copytree(micro_overlay, layout.initial_overlay)
        save_config(made, root / f"{name}.yaml")
        return made

    return make


@pytest.fixture(scope="module")
def whole(make_run: MakeRun, ray_session: None) -> RunLayout:
    """The run that nothing disturbed."""
    return trained(make_run("whole"))


def trained(config: Config) -> RunLayout:
    run_single_stage(config, "train")
    return RunLayout(config.run.directory)


def overlay(layout: RunLayout) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(layout.overlay.iterdir())}


def losses(layout: RunLayout) -> list[float]:
    records = [record for record in read_metrics(layout.metrics) if record["event"] == "step"]
    assert [record["step"] for record in records] == list(range(len(records))), "every step stands once"
    return [record["loss"] for record in records]


def steps_taken(layout: RunLayout) -> int:
    return max((record["step"] + 1 for record in read_metrics(layout.metrics)), default=0)


def training_workers() -> list[psutil.Process]:
    """Processes of this session's Ray that train; Ray writes what they run in their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("RayTrainWorker" in part for part in process.cmdline()[:1]):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


class Killer(threading.Thread):
    """Kills a training worker each time the run has taken another so many steps."""

    def __init__(self, layout: RunLayout, at: list[int], signals: list[int]) -> None:
        super().__init__(daemon=True)
        self.layout, self.at, self.signals = layout, at, signals
        self.killed: list[int] = []
        self.ended = threading.Event()

    def run(self) -> None:
        for step, how in zip(self.at, self.signals, strict=True):
            while steps_taken(self.layout) < step:
                if self.ended.wait(0.005):
                    return
            victims = [process for process in training_workers() if process.pid not in self.killed]
            os.kill(victims[len(self.killed) % len(victims)].pid, how)
            self.killed.append(victims[len(self.killed) % len(victims)].pid)
            psutil.wait_procs(victims, timeout=PATIENCE_SECONDS)


def test_workers_killed_twice_end_with_the_same_overlay(make_run, whole):
    config = make_run("killed-workers")
    layout = RunLayout(config.run.directory)
    killer = Killer(layout, [12, 30], [signal.SIGKILL, signal.SIGTERM])
    killer.start()
    try:
        trained(config)
    finally:
        killer.ended.set()
        killer.join()
    assert len(killer.killed) == 2
    assert [record["event"] for record in read_metrics(layout.metrics)].count("resume") == 2
    assert overlay(layout) == overlay(whole)
    assert losses(layout) == losses(whole)


def wait_for_steps(layout: RunLayout, steps: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        if steps_reached(layout.checkpoints) >= steps:
            return
        time.sleep(0.005)
    raise AssertionError("no checkpoint appeared")


def test_a_driver_killed_and_one_told_to_stop_continue_and_end_with_the_same_overlay(make_run, whole, tmp_path):
    config = make_run("killed-driver")
    layout, log = RunLayout(config.run.directory), tmp_path / "log.txt"
    path = layout.directory.parent / "killed-driver.yaml"
    process = start_stage("train", path, log)
    wait_for_steps(layout, 14, process)
    kill_with_everything_it_started(process)
    assert not layout.overlay.exists()
    reached = steps_reached(layout.checkpoints)
    assert 14 <= reached < STEPS

    changed = load_config(path, ["train.averaging.alpha=0.5"])
    with pytest.raises(ConfigError, match=rf"reached step {reached}, .*train\.averaging\.alpha was 0\.25 and is 0\.5"):
        run_single_stage(changed, "train")
    assert steps_reached(layout.checkpoints) == reached, "nothing is lost by asking"

    process = start_stage("train", path, log)
    wait_for_steps(layout, reached + 14, process)
    process.terminate()
    assert process.wait(PATIENCE_SECONDS) == INTERRUPTED
    assert "the same command continues where this one stopped" in log.read_text()

    assert start_stage("train", path, log).wait(PATIENCE_SECONDS) == 0, log.read_text()
    resumed = [record["step"] for record in read_metrics(layout.metrics) if record["event"] == "resume"]
    assert resumed[0] == reached
    assert len(resumed) == 2
    assert overlay(layout) == overlay(whole)
    assert losses(layout) == losses(whole)


@pytest.mark.slow
def test_one_worker_and_three_agree(make_run, whole):
    alone = trained(make_run("alone", **{"resources.workers": 1, "train.micro_batch_sequences": 8}))
    for found, expected in zip(losses(alone)[:20], losses(whole)[:20], strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
    parts: list[Any] = [read_metrics(layout.metrics)[0] for layout in (alone, whole)]
    assert parts[0]["tokens"] == parts[1]["tokens"]


@pytest.mark.slow
def test_with_fewer_places_than_workers_wanted_it_trains_on_those_there_are(make_run, whole):
    config = make_run("elastic", **{"resources.workers": 8, "resources.min_workers": 1})
    for found, expected in zip(losses(trained(config))[:20], losses(whole)[:20], strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
