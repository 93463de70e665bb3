"""Hardware by name: what is understood, what is refused, and which machine is planned for."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexus_ray.config import PlanSection
from nexus_ray.errors import ConfigError
from nexus_ray.planning.hardware import kind_of_device, parse_hardware
from nexus_ray.planning.machine import HERE, planned_machine
from nexus_ray.planning.needs import GIB


@pytest.mark.parametrize(
    ("text", "name", "gpus", "nodes", "per_node"),
    [
        ("h100x8", "h100", 8, 1, 8),
        ("H200x64", "h200", 64, 8, 8),
        ("l40s", "l40s", 8, 1, 8),
        ("a100-80gbx2", "a100-80gb", 2, 1, 2),
    ],
)
def test_a_name_and_a_number(text: str, name: str, gpus: int, nodes: int, per_node: int) -> None:
    cluster = parse_hardware(text)
    assert (cluster.gpu.name, cluster.gpus, cluster.nodes, cluster.per_node) == (name, gpus, nodes, per_node)


@pytest.mark.parametrize("text", ["h100x0", "h100x12", "x8", "h100x", "", "b300x8", "8xh100"])
def test_what_is_no_hardware_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(ConfigError, match=r"plan\.hardware") as caught:
        parse_hardware(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_a_gpu_is_known_by_what_its_driver_calls_it(device: str, name: str) -> None:
    kind = kind_of_device(device)
    assert kind is not None
    assert kind.name == name


def test_an_unlisted_gpu_is_not_taken_for_another() -> None:
    assert kind_of_device("NVIDIA GeForce RTX 4090") is None


def test_a_plan_is_for_this_machine_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    assert planned_machine(PlanSection(), tmp_path).name == HERE
    cluster = planned_machine(PlanSection(hardware="h100x16"), tmp_path)
    assert (cluster.name, cluster.nodes, cluster.total_gpus) == ("h100x16", 2, 16)
    assert cluster.gpus[0] == 80 * 10**9
    assert cluster.free_disk is None


def test_the_memory_of_a_gpu_can_be_told(tmp_path: Path) -> None:
    assert planned_machine(PlanSection(gpu_memory_gib=48, hardware="h100x4"), tmp_path).gpus == (48 * GIB,) * 4
    assert planned_machine(PlanSection(gpu_memory_gib=48), tmp_path).gpus[0] == 48 * GIB
