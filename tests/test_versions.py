"""Workers refuse to compute with other versions, or other code, than the process that started them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nexus_ray
from nexus_ray.cluster.pool import _Guarded
from nexus_ray.errors import NexusError
from nexus_ray.versions import driver_versions, require_same, versions_here

PACKAGE = Path(nexus_ray.__file__).parent


def test_the_same_is_accepted():
    require_same(versions_here(), "10.0.0.7")


@pytest.mark.parametrize("name", ["Python", "ray", "torch", "transformers", "numpy", "nexus_ray's sources"])
def test_what_differs_is_named_with_its_node(name):
    wanted = versions_here() | {name: "0.0"}
    with pytest.raises(NexusError, match=rf"10\.0\.0\.7 .*: {name} .* instead of 0\.0") as raised:
        require_same(wanted, "10.0.0.7")
    assert str(raised.value).count("instead of") == 1
    assert "--working-dir ." in str(raised.value)
    assert (str(PACKAGE) in str(raised.value)) == (name == "nexus_ray's sources")


def test_builds_and_patches_that_change_nothing_do_not_matter():
    here = versions_here()
    assert here["torch"] == torch.__version__.partition("+")[0]
    assert here["Python"] == ".".join(map(str, sys.version_info[:2]))
    assert here["numpy"].count(".") == 1


def test_a_changed_line_of_code_is_another_version_and_a_copy_elsewhere_is_not(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "nexus_ray", ignore=shutil.ignore_patterns("__pycache__"))
    program = 'from nexus_ray.versions import versions_here; print(versions_here()["nexus_ray\'s sources"])'

    def of_copy() -> str:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert of_copy() == versions_here()["nexus_ray's sources"]
    with (tmp_path / "nexus_ray" / "layout.py").open("a") as file:
        file.write("# changed\n")
    assert of_copy() != versions_here()["nexus_ray's sources"]


def test_where_ray_was_started_here_nothing_is_compared(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert driver_versions() == {}
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert driver_versions() == versions_here()


def test_a_worker_of_a_pool_refuses_before_it_loads_anything():
    """What it says comes back as data, whatever it is asked to do."""

    def load() -> None:
        raise AssertionError

    worker = _Guarded(load, {}, "collect", versions_here() | {"torch": "1.0"})  # type: ignore[arg-type]
    answer = worker({"index": 0})
    assert answer["error"] == "NexusError"
    assert "instead of 1.0" in answer["message"]
