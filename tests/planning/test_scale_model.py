"""The scale model by hand: what bounds workers, bytes on the wire, rounds of units, money."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from pathlib import Path

import pytest

from nexus_ray.config import Config, load_config
from nexus_ray.planning.hardware import parse_hardware
from nexus_ray.planning.machine import Machine, cluster_machine
from nexus_ray.planning.published import model_sizes
from nexus_ray.planning.scale import figures
from nexus_ray.planning.scale.before import averaged_experts, base_on_nodes
from nexus_ray.planning.scale.costs import RunCost, StageCost, TimePart
from nexus_ray.planning.scale.learning import reduced_bytes, step_time, train
from nexus_ray.planning.scale.model import planned_run, price_of, run_cost
from nexus_ray.planning.scale.run import PlannedRun, text_of_tokens, with_assumed_text
from nexus_ray.planning.scale.teaching import precompute
from nexus_ray.planning.storage import moments_bytes

CONFIGS = Path(__file__).parents[2] / "configs"
Machines = Callable[..., Machine]


def _run(*overrides: str, model: str = "gpt-oss-120b", hardware: str = "h100x8") -> PlannedRun:
    config = _config(*overrides, model=model, hardware=hardware)
    return planned_run(config, model_sizes(Path(model)), {}, cluster_machine(parse_hardware(hardware)))


def _config(*overrides: str, model: str = "gpt-oss-120b", hardware: str = "h100x8") -> Config:
    return load_config(CONFIGS / f"{model}.yaml", [f"plan.hardware={hardware}", *overrides])


def _parts(stage: StageCost) -> dict[str, float]:
    return {part.name: part.seconds for part in stage.parts}


def test_a_stage_adds_up() -> None:
    parts = (TimePart("wait", 60, held=False), TimePart("start", 40), TimePart("work", 140, scales=True))
    stage = StageCost("collect", parts, workers=2, gpus=4)
    assert (stage.seconds, stage.fixed_seconds) == (240, 100)
    assert stage.gpu_hours == pytest.approx(180 * 4 / 3600)
    assert RunCost((stage, stage), 3.0, "").money == pytest.approx(2 * 3 * 180 * 4 / 3600)


def test_gradients_on_the_wire_are_counted() -> None:
    """36 layers: gate and up [5760, 2880] and [5760], down [2880, 2880] and [2880], a gate [2880] and its bias."""
    trained = 36 * (5760 * 2880 + 5760 + 2880 * 2880 + 2880 + 2880 + 1)
    run = _run("resources.workers=4")
    assert run.worker.overlay.trained == trained
    assert reduced_bytes(run) == pytest.approx(2 * 3 / 4 * 4 * trained)
    assert step_time(run).reduce == pytest.approx(reduced_bytes(run) / 450e9)


def test_between_nodes_the_slower_of_two_ways_counts() -> None:
    """Of L40S the links inside a node, of A100 the network between nodes."""
    slow_links = _run("resources.workers=8", hardware="l40sx16")
    assert step_time(slow_links).reduce == pytest.approx(reduced_bytes(slow_links) / 32e9)
    slow_network = _run("resources.workers=8", hardware="a100x16")
    assert step_time(slow_network).reduce == pytest.approx(reduced_bytes(slow_network) / 50e9)


def test_one_worker_reduces_nothing() -> None:
    assert step_time(_run("resources.workers=1")).reduce == 0


def test_a_batch_of_32_sequences_cannot_use_256_workers() -> None:
    stages = [train(_run(f"resources.workers={workers}", hardware="h100x512")) for workers in (32, 256)]
    assert [stage.workers for stage in stages] == [32, 32]
    assert _parts(stages[0])["batches"] == _parts(stages[1])["batches"]
    assert stages[1].gpu_hours > 7.9 * stages[0].gpu_hours
    assert "224 of 256 workers wait" in stages[1].notes[0]
    assert not any("wait for the others" in note for note in stages[0].notes)


def test_the_worker_with_most_micro_batches_decides() -> None:
    """32 sequences over 20 workers: some have two, one after the other."""
    ten, twenty, most = (_parts(train(_run(f"resources.workers={n}")))["batches"] for n in (10, 20, 32))
    assert (ten, twenty) == (pytest.approx(4 * most), pytest.approx(2 * most))


def test_shards_are_dealt_whole() -> None:
    """33 shards over 32 workers take as long as 64; fewer shards than workers leave some without work."""

    def reads(tokens: int, workers: int) -> float:
        text = {"domain": text_of_tokens(_config(), 10), "general": text_of_tokens(_config(), tokens)}
        config = _config(f"resources.workers={workers}", hardware="h100x128")
        machine = cluster_machine(parse_hardware("h100x128"))
        return _parts(precompute(planned_run(config, model_sizes(Path("gpt-oss-120b")), text, machine)))[
            "teacher reads"
        ]

    shard = 262_144
    assert reads(33 * shard, 32) == pytest.approx(2 * reads(32 * shard, 32))
    assert reads(64 * shard, 32) == pytest.approx(reads(33 * shard, 32))
    assert reads(8 * shard, 64) == pytest.approx(reads(8 * shard, 8))


def test_tokens_are_as_many_shards_as_their_bytes() -> None:
    text = text_of_tokens(_config(), 10**10 // 2)
    assert (text.size, text.shards) == (2 * 10**10, ceil(2 * 10**10 / 2**20))


def test_text_that_is_not_here_is_read_once() -> None:
    """1,000 steps of 16 sequences of 1,024 tokens each."""
    assert {source.tokens for source in with_assumed_text(_config(), {}).values()} == {1000 * 16 * 1024}
    wanted = with_assumed_text(_config("targets.max_tokens=5000000"), {})
    assert {source.tokens for source in wanted.values()} == {5_000_000}


def test_every_node_fetches_the_base() -> None:
    """65.2 GB at 10 Gbit/s; 64 nodes want 64 times 1.25 GB/s of the store."""
    stage = base_on_nodes(_run(hardware="h100x512"))
    assert _parts(stage)["base to each node"] == pytest.approx(65.25e9 / 1.25e9, rel=0.001)
    assert stage.moved == pytest.approx(64 * 65.25e9, rel=0.001)
    assert "80.0 GB/s" in stage.notes[0]
    assert stage.gpus == 512


def test_a_units_moments_have_the_size_that_was_measured() -> None:
    """`benchmarks/driver_limits.py` wrote files of 9,732,568 bytes."""
    assert moments_bytes(model_sizes(Path("gpt-oss-120b"))) == pytest.approx(9_732_568, rel=0.001)


@pytest.mark.parametrize(
    ("method", "experts"),
    [("top1_zero", 1), ("random", 1), ("top4_average", 4), ("pca_topK", 8), ("aligned_top24", 24)],
)
def test_experts_that_a_layer_is_made_from(method: str, experts: int) -> None:
    assert averaged_experts(_run(f"convert.initialisation={method}")) == experts


def test_conversion_is_near_what_was_measured() -> None:
    """docs/convert.md: 47 s for 120B and 24 s for 20B with `pca_top24`, on two cores."""
    for model, seconds in (("gpt-oss-120b", 47), ("gpt-oss-20b", 24)):
        run = _run("convert.initialisation=pca_top24", model=model)
        found = run_cost(run.config, run.sizes, {}, run.machine)
        stage = next(each for each in found.stages if each.stage == "convert")
        assert stage.seconds == pytest.approx(seconds, rel=0.5)


def test_published_speeds_mean_these_shares_of_the_peak() -> None:
    """6 x 3.61e9 x 13,058 = 283 TFLOP/s and 6 x 5.13e9 x 7,626 = 235 TFLOP/s of 989."""
    shares = [figures.published_utilisation(speed, active, 989e12) for _, _, speed, active in figures.AUTOMODEL]
    assert shares == [pytest.approx(0.286, abs=5e-4), pytest.approx(0.237, abs=5e-4)]
    assert min(shares) < figures.UTILISATION < max(shares)


def test_every_figure_says_what_it_is() -> None:
    assert len(figures.FIGURES) > 20
    assert {figure.kind for figure in figures.FIGURES} <= {"measured here", "exact", "published elsewhere", "assumed"}
    assert all(figure.source and figure.unit for figure in figures.FIGURES)


def test_prices(machine: Machines) -> None:
    """A configured price counts everywhere, a list price only where hardware is named."""
    cluster = cluster_machine(parse_hardware("h100x8"))
    assert price_of(_config(), cluster) == 4.916
    assert price_of(_config("plan.price_per_gpu_hour=2"), cluster) == 2
    here = load_config(CONFIGS / "gpt-oss-120b.yaml", [])
    assert price_of(here, machine(gpus=(80,))) is None
    assert price_of(_config(hardware="a100-80gbx8"), cluster_machine(parse_hardware("a100-80gbx8"))) is None


def test_more_gpus_take_no_longer_and_cost_no_less() -> None:
    def found(workers: int) -> RunCost:
        run = _run(f"resources.workers={workers}", "train.steps=10000", hardware="h100x64")
        return run_cost(run.config, run.sizes, {}, run.machine)

    one, eight, many = (found(workers) for workers in (1, 8, 32))
    assert one.seconds > eight.seconds > many.seconds
    assert one.gpu_hours <= eight.gpu_hours <= many.gpu_hours


def test_online_training_pays_for_its_teacher_in_every_step() -> None:
    offline, online = (train(_run(f"train.mode={mode}")) for mode in ("offline", "online"))
    assert _parts(online)["batches"] > 1.1 * _parts(offline)["batches"]
    taught = precompute(_run("train.mode=online"))
    assert _parts(taught)["teacher reads"] == 0
    assert taught.gpus == 0
