"""`nexus-ray collect` killed without warning, Ray and all: the same command ends with the same files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nexus_ray.config import save_config
from nexus_ray.layout import RunLayout
from nexus_ray.storage import sha256_file

pytestmark = pytest.mark.ray
_PATIENCE_SECONDS = 120
_SMALL_UNITS = {"collect.batch_sequences": 1, "collect.unit_batches": 1, "collect.tokens": 8192}


def command(config_path: Path, log: Path) -> subprocess.Popen[bytes]:
    """`nexus-ray collect` in a process of its own, which starts a Ray of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    arguments = [sys.executable, "-m", "nexus_ray", "collect", str(config_path)]
    with log.open("ab") as output:
        return subprocess.Popen(arguments, env=environment, stdout=output, stderr=output, start_new_session=True)


def kill_with_everything_it_started(process: subprocess.Popen[bytes]) -> None:
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)
    process.wait(timeout=30)


def wait_for_parts(directory: Path, count: int, process: subprocess.Popen[bytes]) -> int:
    """The number of parts when there are `count` of them."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
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

    process = command(tmp_path / "killed.yaml", log)
    parts = layouts["killed"].directory / "router_stats.partial"
    wait_for_parts(parts, 5, process)
    kill_with_everything_it_started(process)
    assert not layouts["killed"].router_stats.exists()
    left = {path.name: path.stat().st_mtime_ns for path in parts.glob("unit-*.safetensors")}
    assert left

    for name in ("killed", "whole"):
        assert command(tmp_path / f"{name}.yaml", log).wait(_PATIENCE_SECONDS) == 0, log.read_text()
    assert f"continuing: {len(left)} of " in log.read_text(), "what was done is not done again"
    assert digests(layouts["killed"]) == digests(layouts["whole"])
    assert not parts.exists()
