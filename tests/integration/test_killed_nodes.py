"""A node that vanishes in the middle of a stage: the same command goes on by itself and ends with the same bytes."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from killed_commands import PATIENCE_SECONDS, start_stage

from nexus_ray.config import Config, save_config
from nexus_ray.layout import RunLayout
from nexus_ray.router.collect import collect
from nexus_ray.storage import sha256_file
from nexus_ray.targets.writing import precompute
from nexus_ray.training.recovery import steps_reached
from nexus_ray.training.watching.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
_STORE = {"object_store_memory": 80 * 2**20}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs and two worker nodes with one each, all on this machine."""
    from ray.cluster_utils import Cluster

    scratch = tempfile.mkdtemp(prefix="ray")  # not pytest's: the paths of sockets must be short
    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": scratch}
    nodes = Cluster(initialize_head=True, head_node_args=head | _STORE)
    for _ in range(2):
        nodes.add_node(num_cpus=1, wait=False, **_STORE)
    nodes.wait_for_nodes(timeout=PATIENCE_SECONDS)
    yield nodes
    nodes.shutdown()
    shutil.rmtree(scratch, ignore_errors=True)


def lose_a_node(cluster: Any) -> None:
    """End a node's raylet by SIGKILL; its workers end with it."""
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 2 * PATIENCE_SECONDS
    while not happened():
        assert process.poll() is None, f"it ended before a node was lost: {log.read_text()}"
        assert time.monotonic() < deadline, "it did not begin"
        time.sleep(0.01)


def digests(*paths: Path) -> list[str]:
    return [sha256_file(path) for path in paths]


def test_collection_goes_on_without_the_node_and_its_files_are_the_same(
    make_micro_config, tmp_path, in_process, cluster
):
    small = {"collect.batch_sequences": 1, "collect.unit_batches": 1, "collect.tokens": 8192}
    whole, hit = (make_micro_config(tmp_path / name, **small) for name in ("whole", "hit"))
    collect(whole, RunLayout(whole.run.directory))
    save_config(hit, tmp_path / "hit.yaml")
    layout, log = RunLayout(hit.run.directory), tmp_path / "log.txt"

    process = start_stage("collect", tmp_path / "hit.yaml", log, cluster.address)
    parts = layout.directory / "router_stats.partial"
    wait_until(lambda: len(list(parts.glob("unit-*.safetensors"))) >= 3, process, log)
    lose_a_node(cluster)
    assert not layout.router_stats.exists()
    assert process.wait(2 * PATIENCE_SECONDS) == 0, log.read_text()

    names = ("router_stats.safetensors", "router_stats.json", "calibration.safetensors", "calibration.json")
    expected = digests(*(Path(whole.run.directory) / name for name in names))
    assert digests(*(layout.directory / name for name in names)) == expected
    assert not parts.exists()


@pytest.fixture
def make_run(make_micro_config, micro_overlay, tmp_path, monkeypatch) -> Callable[[str], Config]:
    """A function (name) -> configuration of a run that has everything but its training."""

    def run_here(worker, arguments, items, *_):
        return map(worker(**arguments), items)

    def make(name: str) -> Config:
        settings = {"train.steps": 60, "train.checkpoint_every": 5, "resources.max_failures": 0}
        config = make_micro_config(tmp_path / name, **settings)
        layout = RunLayout(config.run.directory)
        with monkeypatch.context() as patch:
            patch.setattr(precompute, "map_over_pool", run_here)
            precompute.precompute_run(config, layout)
        shutil.copytree(micro_overlay, layout.initial_overlay)
        save_config(config, tmp_path / f"{name}.yaml")
        return config

    return make


@pytest.mark.slow
def test_training_goes_on_when_another_node_comes_and_its_overlay_is_the_same(make_run, tmp_path, cluster):
    layouts = {name: RunLayout(make_run(name).run.directory) for name in ("whole", "hit")}
    log = tmp_path / "log.txt"
    assert start_stage("train", tmp_path / "whole.yaml", log, cluster.address).wait(PATIENCE_SECONDS) == 0

    process = start_stage("train", tmp_path / "hit.yaml", log, cluster.address)
    wait_until(lambda: steps_reached(layouts["hit"].checkpoints) >= 10, process, log)
    lose_a_node(cluster)
    cluster.add_node(num_cpus=1, wait=False, **_STORE)
    assert process.wait(2 * PATIENCE_SECONDS) == 0, log.read_text()

    assert "training lost a node" in log.read_text()
    assert [record["event"] for record in read_metrics(layouts["hit"].metrics)].count("resume") == 1
    found, expected = (digests(*sorted(layout.overlay.iterdir())) for layout in layouts.values())
    assert found == expected
