"""What a machine says of itself."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from nexus_ray.planning import machine
from nexus_ray.planning.machine import this_machine


def test_a_directory_that_does_not_exist_yet_counts_on_its_parent_disk(tmp_path: Path) -> None:
    found = this_machine(tmp_path / "not" / "yet")
    assert found.free_disk == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    assert not (tmp_path / "not").exists()


def test_memory_is_that_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", ())
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert this_machine(tmp_path).memory == pytest.approx(total, rel=0.02)


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, unlimited = tmp_path / "memory.max", tmp_path / "other"
    limit.write_text("123456789\n")
    unlimited.write_text("max\n")
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", (unlimited, limit))
    found = this_machine(tmp_path)
    assert found.memory == 123456789
    assert found.available is None or found.available <= 123456789


def test_a_system_without_meminfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", ())
    found = this_machine(tmp_path)
    assert found.memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found.available is None
