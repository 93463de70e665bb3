"""`nexus-ray precompute` killed without warning, Ray and all, again and again: it ends with the same files.

The kills come at random moments after another shard is there, so that some of them hit a worker in the middle of one.
"""

import random
import subprocess
import time
from pathlib import Path

import pytest
from killed_commands import PATIENCE_SECONDS, kill_with_everything_it_started, start_stage

from nexus_ray.config import save_config
from nexus_ray.layout import RunLayout
from nexus_ray.targets.format import MANIFEST
from nexus_ray.targets.writing import precompute

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
_SMALL_SHARDS = {
    "data.shard_bytes": 1024,
    "targets.batch_sequences": 1,
    "targets.mode": "sampled",
    "train.sources.play.router_kl": 1.0,
}
_KILLS = 2


def shards(directory: Path) -> dict[str, int]:
    """When each shard that has a record was written."""
    records = [path for path in directory.glob("*.json") if path.name != MANIFEST]
    return {path.stem: path.with_suffix(".parquet").stat().st_mtime_ns for path in records}


def wait_for_another_shard(directory: Path, process: subprocess.Popen[bytes]) -> None:
    deadline, before = time.monotonic() + PATIENCE_SECONDS, len(shards(directory))
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        if len(shards(directory)) > before:
            return
        time.sleep(0.01)
    raise AssertionError("no shards appeared")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def whole(make_micro_config, tmp_path, monkeypatch) -> Path:
    """The target set that nothing disturbed, made without Ray."""

    def run_here(worker, arguments, items, *_):
        return map(worker(**arguments), items)

    monkeypatch.setattr(precompute, "map_over_pool", run_here)
    config = make_micro_config(tmp_path / "whole", **_SMALL_SHARDS)
    precompute.precompute_run(config, RunLayout(config.run.directory))
    return RunLayout(config.run.directory).targets


@pytest.mark.slow
def test_sigkill_at_random_moments_and_a_restart_give_the_same_files(make_micro_config, tmp_path, whole):
    generator = random.Random(0)
    config = make_micro_config(tmp_path / "killed", **_SMALL_SHARDS)
    save_config(config, tmp_path / "killed.yaml")
    directory, log = RunLayout(config.run.directory).targets, tmp_path / "log.txt"
    done: dict[str, int] = {}
    for _ in range(_KILLS):
        process = start_stage("precompute", tmp_path / "killed.yaml", log)
        wait_for_another_shard(directory, process)
        time.sleep(generator.uniform(0, 0.05))
        kill_with_everything_it_started(process)
        assert not (directory / MANIFEST).exists()
        after = shards(directory)
        assert after.items() > done.items(), "what was done is kept as it is"
        done = after

    assert start_stage("precompute", tmp_path / "killed.yaml", log).wait(PATIENCE_SECONDS) == 0, log.read_text()
    assert f"continuing: {len(done)} of " in log.read_text()
    assert all((directory / f"{name}.parquet").stat().st_mtime_ns == time for name, time in done.items())
    assert contents(directory) == contents(whole)
