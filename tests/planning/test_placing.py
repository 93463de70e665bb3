"""The placement of a worker's layers: bytes of each device by the real split, the fewest GPUs, and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nexus_ray.config import Config, load_config
from nexus_ray.modeling.placement import split_layers
from nexus_ray.planning.machine import Machine
from nexus_ray.planning.needs import GIB
from nexus_ray.planning.placing import Placement, placements
from nexus_ray.planning.plan import make_plan
from nexus_ray.planning.published import model_sizes
from nexus_ray.planning.stages import stage_needs
from nexus_ray.planning.worker import Worker

CONFIGS = Path(__file__).parents[2] / "configs"
Machines = Callable[..., Machine]


def _config(*overrides: str) -> Config:
    return load_config(CONFIGS / "gpt-oss-120b.yaml", list(overrides))


def _placements(machine: Machine, *overrides: str) -> dict[str, Placement]:
    config, sizes = _config(*overrides), model_sizes(Path("gpt-oss-120b"))
    return {each.stage: each for each in placements(config, sizes, {}, machine, stage_needs(config, sizes, {}))}


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 8])
def test_weights_of_the_devices_are_those_of_the_layers_that_loading_gives_them(gpus: int) -> None:
    sizes = model_sizes(Path("gpt-oss-120b"))
    worker = Worker.of(_config(f"resources.gpus_per_worker={gpus}"), sizes)
    layers = [layer.stored_bytes for layer in sizes.layers]
    around = sizes.stored_bytes - sum(layers)
    expected = [around] + [0] * (gpus - 1)
    for size, device in zip(layers, split_layers(layers, around, gpus), strict=True):
        expected[device] += size  # bfloat16 and packed: as stored
    found: list[int] = []
    worker.each_device(lambda each: found.append(each.own_weights()) or [])  # type: ignore[func-returns-value]
    assert found == expected


def test_the_first_device_holds_the_tables_and_fewer_layers() -> None:
    """201,088 x 2,880 in bfloat16, twice, is more than one layer of 1.75 GB: 17 layers against 19."""
    first, second = Worker.of(_config(), model_sizes(Path("gpt-oss-120b"))).layers
    assert (len(first), len(second)) == (17, 19)


def test_an_even_division_would_have_been_too_small(machine: Machines) -> None:
    train = _placements(machine(gpus=(80,) * 2))["train"]
    assert max(train.peaks) > train.alone / 2


def test_the_choice_that_is_needed_says_why(machine: Machines) -> None:
    train = _placements(machine(gpus=(80,) * 4))["train"]
    assert (train.judgement, train.fewest) == ("fits", 2)
    assert train.why == (
        "2 GPUs a worker, layers 0-16 | 17-35, because 60.8 GiB of weights and what comes with them do not fit one GPU "
        "of 80.0 GiB"
    )


def test_too_few_gpus_say_how_many_to_set(machine: Machines) -> None:
    train = _placements(machine(gpus=(48,) * 4), "resources.gpus_per_worker=1")["train"]
    assert (train.judgement, train.fewest) == ("too small", 2)
    assert "set resources.gpus_per_worker=2" in train.why
    assert _placements(machine(gpus=(48,) * 4), "resources.gpus_per_worker=2")["train"].judgement == "fits"


def test_more_gpus_than_needed_are_wasteful(machine: Machines) -> None:
    found = _placements(machine(gpus=(80,) * 4))["collect"]
    assert (found.judgement, found.fewest) == ("wasteful", 1)
    assert "1 of 80.0 GiB would do" in found.why


def test_nothing_helps_on_small_gpus(machine: Machines) -> None:
    train = _placements(machine(gpus=(4,) * 8))["train"]
    assert (train.judgement, train.fewest) == ("too small", None)
    assert "no number of GPUs" in train.why


def test_without_a_gpu_to_compare_with_there_is_no_verdict(machine: Machines) -> None:
    train = _placements(machine())["train"]
    assert (train.judgement, train.fewest) == ("unknown", None)
    assert "--hardware" in train.why


def test_a_run_on_a_cpu_has_no_placement(machine: Machines, tmp_path: Path) -> None:
    config = load_config(CONFIGS / "demo.yaml", [f"model.path={CONFIGS.parent / 'assets' / 'tiny-gpt-oss'}"])
    sizes = model_sizes(config.model.path)
    assert placements(config, sizes, {}, machine(), stage_needs(config, sizes, {})) == ()


def test_workers_are_spread_over_the_nodes_of_a_cluster() -> None:
    """Two workers of three GPUs fit a node of eight, a third needs another node."""
    sizes = ["resources.gpus_per_worker=3", "plan.hardware=h100x8"]
    two, three = (make_plan(_config(*sizes, f"resources.workers={workers}")) for workers in (2, 3))
    problems = [{stage.needs.stage: stage.problem for stage in plan.stages}["train"] for plan in (two, three)]
    assert problems[0] == ""
    assert problems[1].endswith("9 in all; h100x8 has 8")
    spread = make_plan(_config("resources.gpus_per_worker=3", "plan.hardware=h100x16", "resources.workers=4"))
    assert {stage.needs.stage: stage.problem for stage in spread.stages}["train"] == ""


def test_hosts_hold_their_own_workers_only() -> None:
    one, four = (make_plan(_config("resources.workers=16", f"plan.hardware=h100x{n}")) for n in (32, 64))
    nodes = [{stage.needs.stage: stage.node for stage in plan.stages}["train"] for plan in (one, four)]
    assert nodes[0] > 1.8 * nodes[1] > GIB
