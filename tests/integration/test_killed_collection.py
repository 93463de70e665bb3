"""`nexus-ray collect` killed without warning, Ray and all: the same command ends with the same files."""

import subprocess
import time
from pathlib import Path

import pytest
from killed_commands import PATIENCE_SECONDS, kill_with_everything_it_started, start_stage

from nexus_ray.config import save_config
from nexus_ray.layout import RunLayout
from nexus_ray.storage import sha256_file

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
_SMALL_UNITS = {"collect.batch_sequences": 1, "collect.unit_batches": 1, "collect.tokens": 8192}


def wait_for_parts(directory: Path, count: int, process: subprocess.Popen[bytes]) -> int:
    """The number of parts when there are `count` of them."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        found = len(list(directory.glob("unit-*.safetensors")))
        if found >= count:
            return found
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    raise AssertionError("no parts appeared")


def digests(layout: RunLayout) -> list[str]:
    files = (layout.router_stats, layout.calibration)
    return [sha256_file(path) for file in files for path in (file, file.with_suffix(".json"))]


def test_sigkill_in_the_middle_and_a_restart_give_the_same_files(make_micro_config, tmp_path):
    layouts = {}
    for name in ("killed", "whole"):
        config = make_micro_config(tmp_path / name, **_SMALL_UNITS)
        save_config(config, tmp_path / f"{name}.yaml")
        layouts[name] = RunLayout(config.run.directory)
    log = tmp_path / "log.txt"

    process = start_stage("collect", tmp_path / "killed.yaml", log)
    parts = layouts["killed"].directory / "router_stats.partial"
    wait_for_parts(parts, 5, process)
    kill_with_everything_it_started(process)
    assert not layouts["killed"].router_stats.exists()
    left = {path.name: path.stat().st_mtime_ns for path in parts.glob("unit-*.safetensors")}
    assert left

    for name in ("killed", "whole"):
        assert start_stage("collect", tmp_path / f"{name}.yaml", log).wait(PATIENCE_SECONDS) == 0, log.read_text()
    assert f"continuing: {len(left)} of " in log.read_text(), "what was done is not done again"
    assert digests(layouts["killed"]) == digests(layouts["whole"])
    assert not parts.exists()
