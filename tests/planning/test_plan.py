"""The plan as a whole: verdicts, the change that helps, storage, the command."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.cli import run_command
from nexus_ray.config import Config, load_config
from nexus_ray.errors import ModelError
from nexus_ray.planning.machine import Machine
from nexus_ray.planning.needs import GIB, StageNeeds
from nexus_ray.planning.plan import Plan, make_plan
from nexus_ray.planning.sizes import ModelSizes, read_sizes
from nexus_ray.planning.stages import kv_cache_bytes, stage_needs
from nexus_ray.planning.text import SourceText
from nexus_ray.planning.training import training_needs, training_phases
from nexus_ray.planning.verdicts import judge, with_change
from nexus_ray.planning.worker import Worker
from nexus_ray.targets.reading.reader import CACHE_BYTES

STAGES = ["collect", "convert", "precompute", "train", "evaluate", "serve"]
Machines = Callable[..., Machine]
MakeConfig = Callable[..., Config]


def _verdicts(plan: Plan) -> dict[str, bool]:
    return {stage.needs.stage: stage.fits for stage in plan.stages}


def test_a_small_run_fits(micro_config: MakeConfig, machine: Machines, tmp_path: Path) -> None:
    plan = make_plan(micro_config(tmp_path), machine())
    assert _verdicts(plan) == dict.fromkeys(STAGES, True)
    assert plan.fits
    assert not any(stage.problem for stage in plan.stages)


def test_online_training_has_no_precompute(micro_config: MakeConfig, machine: Machines, tmp_path: Path) -> None:
    plan = make_plan(micro_config(tmp_path, **{"train.mode": "online"}), machine())
    assert [stage.needs.stage for stage in plan.stages] == [name for name in STAGES if name != "precompute"]


def test_a_change_that_helps_is_found_and_helps(micro_config: MakeConfig, machine: Machines, tmp_path: Path) -> None:
    settings = {"train.sources.play.sequences_per_step": 4096, "train.micro_batch_sequences": 4096}
    settings["resources.workers"] = 1
    small = machine(memory=3)
    train = {stage.needs.stage: stage for stage in make_plan(micro_config(tmp_path, **settings), small).stages}["train"]
    assert not train.fits
    assert "memory" in train.problem
    assert train.change
    changed = settings | {change.split("=")[0]: json.loads(change.split("=")[1]) for change in train.change}
    assert _verdicts(make_plan(micro_config(tmp_path, **changed), small))["train"]


def test_missing_gpus_are_counted(micro_config: MakeConfig, machine: Machines, tmp_path: Path) -> None:
    config = micro_config(tmp_path, **{"resources.workers": 2, "resources.gpus_per_worker": 1})
    without, one, two = (make_plan(config, machine(gpus=gpus)) for gpus in [(), (80.0,), (80.0, 80.0)])
    problems = [{stage.needs.stage: stage.problem for stage in plan.stages} for plan in (without, one)]
    assert problems[0]["train"].endswith("2 in all; this machine has 0")
    assert problems[1]["train"].endswith("2 in all; this machine has 1")
    assert problems[0]["convert"] == ""  # on the CPU
    assert two.fits


def test_a_model_too_large_for_a_gpu_is_spread(micro_config: MakeConfig, machine: Machines, tmp_path: Path) -> None:
    settings = {"resources.workers": 1, "resources.gpus_per_worker": 1}
    whole = {s.needs.stage: s for s in make_plan(micro_config(tmp_path, **settings), machine(gpus=(80.0,))).stages}
    need = whole["train"].peak.total / GIB
    spread = make_plan(
        micro_config(tmp_path, **settings | {"resources.gpus_per_worker": 2}), machine(gpus=(80.0, 80.0))
    )
    assert {s.needs.stage: s for s in spread.stages}["train"].peak.total < whole["train"].peak.total
    lacking = make_plan(micro_config(tmp_path, **settings), machine(gpus=(0.9 * need,)))
    assert "GiB of each GPU" in {s.needs.stage: s.problem for s in lacking.stages}["train"]


def test_a_full_disk_is_seen(micro_config: MakeConfig, machine: Machines, tmp_path: Path) -> None:
    plan = make_plan(micro_config(tmp_path), machine(disk=0.0001))
    assert not plan.storage_fits
    assert not plan.fits


def test_a_base_larger_than_memory_is_a_warning(
    micro_config: MakeConfig, machine: Machines, micro_model: Path, tmp_path: Path
) -> None:
    config = micro_config(tmp_path, **{"resources.workers": 1})
    worker = Worker.of(config, dataclasses.replace(read_sizes(micro_model), packed_bytes=40 * GIB))
    needs = worker.stage("train", 1, training_phases)
    assert judge(needs, machine(memory=24)).fits
    assert "read from disk again" in judge(needs, machine(memory=24)).problem
    assert judge(needs, machine(memory=48)).problem == ""


@pytest.mark.parametrize("field", ["data.sequence_length", "train.micro_batch_sequences", "targets.batch_sequences"])
def test_more_work_takes_no_less(micro_config: MakeConfig, micro_model: Path, tmp_path: Path, field: str) -> None:
    def total(value: int) -> int:
        config = micro_config(tmp_path, **{"train.sources.play.sequences_per_step": 64, field: value})
        return sum(stage.peak.total for stage in stage_needs(config, read_sizes(micro_model), {}))

    assert total(8) < total(12) < total(24)


def test_kv_cache_of_the_published_shape(micro_model: Path) -> None:
    """GPT-OSS 20B: 8 heads of 64, 24 layers, every other one with a window of 128; bfloat16."""
    dimensions = dataclasses.replace(read_sizes(micro_model).dimensions, layers=24)
    shape = {"key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "sliding_layers": 12}
    sizes = dataclasses.replace(read_sizes(micro_model), dimensions=dimensions, **shape)
    assert kv_cache_bytes(sizes, 100, 2) == 2 * 8 * 64 * 24 * 100 * 2
    assert kv_cache_bytes(sizes, 1000, 2) == 2 * 8 * 64 * (12 * 1000 + 12 * 128) * 2


def test_training_holds_no_more_targets_than_its_cache(
    micro_config: MakeConfig, micro_model: Path, tmp_path: Path
) -> None:
    def stored(tokens: int) -> int:
        text = {"prose": SourceText(1, 10, tokens)}
        train = {each.stage: each for each in stage_needs(micro_config(tmp_path), read_sizes(micro_model), text)}[
            "train"
        ]
        return next((part.size for part in train.phases[0].parts if part.name == "targets, stored"), 0)

    assert 0 < stored(1000) < stored(2000) < CACHE_BYTES
    assert stored(10**9) == CACHE_BYTES


def test_workers_hold_ddp_buckets(micro_config: MakeConfig, micro_model: Path, tmp_path: Path) -> None:
    def parts(workers: int) -> set[str]:
        config = micro_config(tmp_path, **{"resources.workers": workers})
        train = {each.stage: each for each in stage_needs(config, read_sizes(micro_model), {})}["train"]
        return {part.name for phase in train.phases for part in phase.parts}

    assert parts(2) - parts(1) == {"DDP buckets"}


def test_the_command_as_json_and_as_tables(
    micro_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(micro_config(tmp_path / "run").model_dump_json())))
    assert run_command(["plan", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(plan["stages"]) == STAGES
    for stage in plan["stages"].values():
        assert sum(part["size"] for part in stage["parts"]) == stage["worker_peak_bytes"]
    assert plan["storage"]["total"] == sum(size for name, size in plan["storage"].items() if name != "total")
    assert plan["storage"]["targets"] == sum(source["bytes"] for source in plan["targets"].values())
    assert plan["targets"]["play"]["form"] == "tokens only"
    assert list(plan["base_passes"]) == ["collect", "precompute"]
    assert plan["base_passes"]["precompute"]["tokens"] == plan["targets"]["prose"]["teacher_tokens"]
    assert run_command(["plan", str(path), "resources.gpus_per_worker=8"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "train: takes GPUs with" in text
    assert "in all; this machine has" in text
    assert "top 16 in" in text
    assert "assumed, no GPU was measured" in text


def test_planning_reads_no_weights(
    micro_config: MakeConfig, machine: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    for name in ("read", "read_slice", "read_rows"):
        monkeypatch.setattr(CheckpointReader, name, refuse)
    assert make_plan(micro_config(tmp_path), machine()).fits


def test_planning_starts_no_ray(micro_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(micro_config(tmp_path / "run").model_dump_json())))
    program = (
        "import sys; from nexus_ray.cli import run_command; "
        f"assert run_command(['plan', {str(path)!r}, '--json']) == 0; "
        "sys.exit([name for name in ('ray', 'transformers') if name in sys.modules].__repr__())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["demo", "gpt-oss-20b", "gpt-oss-120b"])
def test_the_example_configurations_can_be_planned(micro_model: Path, machine: Machines, name: str) -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml", [f"model.path={micro_model}"])
    plan = make_plan(config, machine(gpus=(80.0,) * 4))
    assert _verdicts(plan) == dict.fromkeys(STAGES, True)
    devices = {stage.needs.stage: stage.needs.device for stage in plan.stages}
    assert devices["train"] == ("cpu" if name == "demo" else "cuda")
    assert devices["convert"] == "cpu"


def test_training_that_only_checkpointing_makes_fit_is_told_so(
    micro_config: MakeConfig, machine: Machines, micro_model: Path, tmp_path: Path
) -> None:
    """Many layers; micro-batches hold one sequence and the model computes in bfloat16 already."""
    sizes = read_sizes(micro_model)
    sizes = dataclasses.replace(sizes, dimensions=dataclasses.replace(sizes.dimensions, layers=24))
    settings = {"train.micro_batch_sequences": 1, "resources.workers": 1, "model.dtype": "bfloat16"}
    config = micro_config(tmp_path, **settings, **{"data.sequence_length": 2048})
    checkpointed = config.model_copy(update={"train": config.train.model_copy(update={"gradient_checkpointing": True})})
    plain, smaller = (judge(_train(each, sizes), machine()) for each in (config, checkpointed))
    between = machine((plain.node + smaller.node) / 2 / 0.95 / GIB)
    verdict = with_change(judge(plain.needs, between), config, sizes, {}, between)
    assert verdict.change == ("train.gradient_checkpointing=true",)


def test_eight_bit_moments_are_a_quarter_in_memory_and_in_checkpoints(
    micro_config: MakeConfig, machine: Machines, tmp_path: Path
) -> None:
    def sizes(name: str) -> tuple[int, int]:
        settings = {"train.optimiser.name": name, "convert.width": 4096, "train.keep_checkpoints": 1}
        plan = make_plan(micro_config(tmp_path, **settings), machine())
        train = {stage.needs.stage: stage for stage in plan.stages}["train"]
        (moments,) = (part.size for part in train.needs.phases[0].parts if part.name == "AdamW moments")
        return moments, plan.as_dict()["storage"]["recovery checkpoints"]

    (plain, plain_disk), (low, low_disk) = sizes("adamw"), sizes("adamw_8bit")
    assert low == pytest.approx(plain / 4, rel=0.03)
    assert plain_disk - low_disk == 2 * (plain - low)  # one kept, one while it is written


def test_averaging_with_the_last_merged_weights_keeps_a_copy_of_them(
    micro_config: MakeConfig, machine: Machines, tmp_path: Path
) -> None:
    def parts(**averaging: object) -> dict[str, int]:
        settings = {f"train.averaging.{name}": value for name, value in averaging.items()}
        plan = make_plan(micro_config(tmp_path, **settings), machine())
        train = {stage.needs.stage: stage for stage in plan.stages}["train"]
        return {part.name: part.size for part in train.needs.phases[0].parts}

    plain, kept = parts(every=5), parts(every=5, anchor="previous")
    assert plain == parts()
    assert kept["anchor of merges"] == kept["checkpoint"] - plain["checkpoint"] == kept["AdamW moments"] // 2


def _train(config: Config, sizes: ModelSizes) -> StageNeeds:
    return {each.stage: each for each in stage_needs(config, sizes, {})}["train"]


def test_workers_may_share_a_gpu(
    micro_config: MakeConfig, machine: Machines, micro_model: Path, tmp_path: Path
) -> None:
    config = micro_config(tmp_path, **{"resources.workers": 2, "resources.gpus_per_worker": 0.5})
    train = _train(config, read_sizes(micro_model))
    one = train.peak.total / GIB
    assert judge(train, machine(gpus=(2.1 * one,))).fits
    assert "of each GPU" in judge(train, machine(gpus=(1.5 * one,))).problem


def test_a_model_on_gpus_takes_host_memory_for_checkpoints(
    micro_config: MakeConfig, micro_model: Path, tmp_path: Path
) -> None:
    """Parameters and both moments are copied to the host to be written."""
    settings = {"resources.gpus_per_worker": 1, "convert.width": 2**18}
    worker = Worker.of(micro_config(tmp_path, **settings), read_sizes(micro_model))
    assert training_needs(worker).host > 3 * 4 * worker.overlay.trained


def test_validation_counts_when_its_micro_batches_are_larger(
    micro_config: MakeConfig, micro_model: Path, tmp_path: Path
) -> None:
    def peak(validation_sequences: int) -> tuple[str, int]:
        sources = {"play": {"sequences_per_step": 1, "cross_entropy": 1.0}}
        settings = {"train.sources": sources, "train.micro_batch_sequences": 64, "resources.workers": 1}
        config = micro_config(tmp_path, **settings, **{"train.validation_sequences": validation_sequences})
        needs = _train(config, read_sizes(micro_model))
        return needs.peak.name, needs.peak.total

    assert peak(1)[0] == "loss"
    name, total = peak(64)
    assert name == "validation"
    assert total > peak(1)[1] + 3 * 64 * 2 * 64 * 65 * 4  # at least three more matrices of attention scores


def test_little_free_memory_is_a_warning(micro_config: MakeConfig, machine: Machines, tmp_path: Path) -> None:
    busy = dataclasses.replace(machine(), available=GIB // 2)
    train = {stage.needs.stage: stage for stage in make_plan(micro_config(tmp_path), busy).stages}["train"]
    assert train.fits
    assert "only 0.5 GiB of memory are free" in train.problem


def test_only_the_change_that_is_needed_is_named(micro_config: MakeConfig, machine: Machines, tmp_path: Path) -> None:
    """One GPU for two workers: smaller batches do not help, one worker does."""
    config = micro_config(tmp_path, **{"resources.workers": 2, "resources.gpus_per_worker": 1})
    plan = make_plan(config, machine(gpus=(80.0,)))
    assert {s.needs.stage: s.change for s in plan.stages}["train"] == ("resources.workers=1",)


def test_a_setting_that_a_stage_has_for_itself_is_named_as_its_own(
    micro_config: MakeConfig, machine: Machines, tmp_path: Path
) -> None:
    config = micro_config(tmp_path, **{"resources.stages.train": {"workers": 2, "gpus_per_worker": 1}})
    stages = {stage.needs.stage: stage for stage in make_plan(config, machine(gpus=(80.0,))).stages}
    assert stages["train"].change == ("resources.stages.train.workers=1",)
    assert (stages["train"].needs.device, stages["collect"].needs.device) == ("cuda", "cpu")


def test_a_damaged_tokenizer_is_refused(micro_config: MakeConfig, micro_model: Path, tmp_path: Path) -> None:
    shutil.copytree(micro_model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        make_plan(micro_config(tmp_path / "run", **{"model.path": str(tmp_path / "model")}))
