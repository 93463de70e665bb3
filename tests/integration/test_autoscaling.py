"""On a cluster with an autoscaler: a job starts with no workers, its pool grows, the workers go when it is done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from autoscaling_cluster import autoscaling_cluster

from nexus_ray.config import Config, save_config
from nexus_ray.layout import RunLayout
from nexus_ray.pipeline import run_pipeline
from nexus_ray.storage import sha256_file

JOB = Path(__file__).with_name("autoscaled_job.py")
_SMALL_UNITS = {"collect.tokens": 4096, "collect.batch_sequences": 2, "collect.unit_batches": 1}


@pytest.fixture(scope="module")
def jobs() -> Iterator[dict[str, str]]:
    """The environment of jobs on a cluster whose head has a CPU too, which is not theirs."""
    with autoscaling_cluster(head_cpus=1, most_workers=2, idle_seconds=5) as environment:
        yield environment | {"PYTHONPATH": os.pathsep.join([str(JOB.parents[2]), os.environ.get("PYTHONPATH", "")])}


def _saved(config: Config) -> Path:
    config.run.directory.mkdir(parents=True)
    path = config.run.directory.with_suffix(".yaml")
    save_config(config, path)
    return path


def _made(config: Config) -> dict[str, str]:
    layout = RunLayout(config.run.directory)
    overlay = sorted(layout.initial_overlay.glob("*.safetensors"))
    return {path.name: sha256_file(path) for path in (layout.router_stats, layout.calibration, *overlay)}


def test_the_pool_grows_to_its_maximum_away_from_the_head_and_the_workers_go_away(
    jobs, make_micro_config, tmp_path, in_process
):
    pool = {"resources.min_workers": 1, "resources.workers": 2}
    config = make_micro_config(tmp_path / "cluster", **_SMALL_UNITS, **pool)
    done = subprocess.run(
        [sys.executable, JOB, _saved(config)], env=jobs, capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["worker_nodes"][0] == 0, "it starts with no workers"
    assert max(seen["worker_nodes"]) == 2, "the pool grows to its maximum"
    assert seen["worker_nodes"][-1] == 0, "the workers go away"
    assert len(seen["worked"]) >= 2
    assert seen["head"] not in seen["worked"]
    assert any(line.startswith("overlay of") for line in seen["elsewhere"]), "convert ran elsewhere, heard here"
    alone = make_micro_config(tmp_path / "alone", **_SMALL_UNITS)
    run_pipeline(alone, last="convert")
    assert _made(config) == _made(alone)


def test_what_no_node_can_ever_hold_is_refused_by_name(jobs, make_micro_config, tmp_path):
    """Within a minute: see tests/cluster/test_placement.py, where the clock is ours."""
    path = _saved(make_micro_config(tmp_path / "run", **{"resources.gpus_per_worker": 1}))
    command = [sys.executable, "-m", "nexus_ray", "precompute", path, "resources.accelerator_type=L40S"]
    done = subprocess.run(command, env=jobs, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 1, done.stderr
    said = " ".join(done.stderr.split())
    assert "precompute targets: a worker needs 1 CPU, 1 GPU (L40S)" in said
    assert "and no autoscaler adds one" in said
    assert "resources.gpus_per_worker=0 computes on CPUs" in said
    assert "Traceback" not in said
