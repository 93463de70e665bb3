"""The loop with a small task: continuing is exact at every step, and nothing bad is trained on, lost or hidden."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from regression import ROUTERS, STEPS, Regression, assert_same, events, train
from torch import Tensor

from nexus_ray.config import AveragingSection, EarlyStopSection, OptimiserSection, ScheduleSection
from nexus_ray.errors import ArtefactError, StorageError
from nexus_ray.training import checkpointing, trainer
from nexus_ray.training.checkpointing import load_checkpoint
from nexus_ray.training.loop import run_steps
from nexus_ray.training.recovery import newest
from nexus_ray.training.watching.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("alone")


AVERAGING = {
    "none": AveragingSection(),
    "initial": AveragingSection(every=4, anchor="initial"),
    "previous": AveragingSection(every=4, anchor="previous"),
}


@pytest.mark.parametrize("anchor", AVERAGING)
def test_continuing_is_exact_wherever_it_was_interrupted(settings, anchor):
    """In the warm-up (steps 0 to 5), around merges (after 3, 7, 11), after the bias freeze (6), in the decay (9 on)."""
    averaging = AVERAGING[anchor]
    whole = train(settings("whole", averaging=averaging))
    expected = [record for record in read_metrics(settings("whole").layout.metrics) if record["event"] == "step"]
    for interrupted in range(1, STEPS):
        name = f"{anchor}-{interrupted}"
        train(settings(name, averaging=averaging), stop_before=interrupted)
        resumed = train(settings(name, averaging=averaging))
        assert resumed.taken[0] == interrupted - interrupted % 3, "from the last checkpoint"
        assert_same(resumed, whole)
        found = [record for record in read_metrics(settings(name).layout.metrics) if record["event"] == "step"]
        assert [(record["step"], record["loss"], record["learning_rate"]) for record in found] == [
            (record["step"], record["loss"], record["learning_rate"]) for record in expected
        ]


def test_interrupted_again_and_again_it_ends_the_same(settings):
    whole = train(settings("whole"))
    for interrupted in (2, 4, 5, 7, 11):
        train(settings("often"), stop_before=interrupted)
    assert_same(train(settings("often")), whole)
    kinds = [event for event, _ in events(settings("often"))]
    assert kinds.count("resume") == 4, "it was interrupted once before the first checkpoint"


def test_a_finished_training_takes_no_more_steps(settings):
    train(settings())
    assert train(settings()).taken == []


def test_merges_and_the_bias_freeze_are_recorded_at_their_steps(settings):
    made = settings(averaging=AVERAGING["initial"])
    task = train(made)
    assert [step for event, step in events(made) if event == "merge"] == [3, 7, 11]
    assert [step for event, step in events(made) if event == "bias_frozen"] == [6]
    rates = [record.get("router_bias_learning_rate") for record in read_metrics(made.layout.metrics)]
    assert not torch.equal(task.parameters["routers.0.bias"], torch.zeros(3))
    assert [rate for rate in rates if rate is not None][6:] == [0.0] * 6


@pytest.mark.parametrize("anchor", AVERAGING)
def test_frozen_biases_keep_their_bits(settings, anchor):
    made = settings(anchor, checkpoint_every=1, averaging=AVERAGING[anchor])
    at_the_freeze = train(made, stop_before=6)
    biases = at_the_freeze.parameters["routers.0.bias"].detach().clone()
    end = train(made)
    assert torch.equal(end.parameters["routers.0.bias"], biases)
    assert not torch.equal(end.parameters["layer.bias"], at_the_freeze.parameters["layer.bias"])


def test_a_missing_anchor_costs_the_merge_and_no_checkpoint(settings, caplog):
    def gone() -> dict[str, Tensor]:
        raise ArtefactError("no overlay-initial there")

    made = settings(averaging=AVERAGING["initial"])
    task = train(made, initial_weights=gone)
    assert_same(task, train(settings("plain")))
    found = events(made)
    assert [step for event, step in found if event == "merge_skipped"] == [3, 7, 11]
    assert [step for event, step in found if event == "checkpoint"] == [2, 5, 8, 11]
    assert "no overlay-initial" in caplog.text


def test_a_rate_of_zero_at_the_end_is_no_freeze(settings):
    schedule = ScheduleSection(warmup=0.0, decay=0.5, floor=0.0)
    made = settings(optimiser=OptimiserSection(learning_rate=0.05, schedule=schedule), averaging=AVERAGING["initial"])
    task = Regression(made.optimiser)
    for group in task.optimiser.param_groups:
        group["routers"] = ROUTERS.model_copy(update={"freeze_bias_at": 1.0})
    run_steps(task, made)
    assert "bias_frozen" not in dict(events(made))
    last = [record for record in read_metrics(made.layout.metrics) if record["event"] == "step"][-1]
    assert last["router_bias_learning_rate"] == 0.0


def test_it_ends_early_when_nothing_is_gained(settings):
    made = settings(validate_every=1, early_stop=EarlyStopSection(patience=2))
    task = train(made, validations=[3.0, 2.0, 2.5, 2.6, 1.0])
    assert task.taken == [0, 1, 2, 3]
    assert ("early_stop", 3) in events(made)
    assert load_checkpoint(made.layout.best, {})["step"] == 2
    assert train(made).taken == [], "it has ended, and stays ended"


def test_the_best_weights_are_those_of_the_best_validation(settings):
    made = settings(validate_every=3, checkpoint_every=3)
    train(made, validations=[2.0, 1.0, 3.0, 4.0])
    best = Regression(made.optimiser)
    assert load_checkpoint(made.layout.best, best.parameters)["best"] == 1.0
    assert_same(best, train(settings("short", checkpoint_every=6), stop_before=6))


def test_a_preemption_notice_is_answered_with_a_checkpoint_at_once_and_only_one(settings, monkeypatch):
    calls = iter(range(100))
    monkeypatch.setattr(trainer, "node_is_leaving", lambda: next(calls) >= 3)
    made = settings(checkpoint_every=100)
    train(made, stop_before=6)
    assert [path.name for path in made.layout.checkpoints.iterdir()] == ["step-00000003"]
    assert [step for event, step in events(made) if event == "preemption"] == [2]
    monkeypatch.setattr(trainer, "node_is_leaving", lambda: False)
    resumed = train(made)
    assert resumed.taken[0] == 3
    assert_same(resumed, train(settings("whole")))


def test_a_full_disk_ends_the_training_and_the_checkpoint_before_is_good(settings, monkeypatch):
    save, calls = checkpointing.save_file, []

    def full_later(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    made = settings(validate_every=100)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "save_file", full_later)
        with pytest.raises(StorageError, match="disk is full"):
            train(made)
    last, _ = newest(made.layout.checkpoints)
    assert last is not None
    assert last.name == "step-00000003"
    assert_same(train(made), train(settings("whole")))


def test_without_its_newest_checkpoint_it_continues_from_the_one_before(settings):
    made = settings()
    train(made, stop_before=8)
    (made.layout.checkpoints / "step-00000006" / "state.safetensors").write_bytes(b"damaged")
    resumed = train(made)
    assert resumed.taken[0] == 3
    assert_same(resumed, train(settings("whole")))
    (warning,) = [record for record in read_metrics(made.layout.metrics) if record["event"] == "warning"]
    assert (warning["kind"], warning["step"]) == ("checkpoint", 2)
    assert "step-00000006" in warning["message"]


def test_without_any_whole_checkpoint_it_is_refused_and_nothing_is_lost(settings):
    made = settings()
    train(made, stop_before=8)
    for path in made.layout.checkpoints.iterdir():
        (path / "state.safetensors").write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in sorted(made.layout.directory.rglob("*")) if path.is_file()}
    with pytest.raises(ArtefactError, match=r"no checkpoint of this training is whole.*step-00000006.*step-00000003"):
        train(made)
    assert before == {path: path.read_bytes() for path in sorted(made.layout.directory.rglob("*")) if path.is_file()}


def test_samples_are_recorded_with_each_validation(settings):
    made = settings()
    train(made)
    found = [record for record in read_metrics(made.layout.metrics) if record["event"] == "sample"]
    assert [(record["step"], record["prompt"], record["text"]) for record in found] == [
        (step, "To be", "or not") for step in (4, 9, 11)
    ]


def test_every_step_says_how_fast_it_was_and_what_it_took(settings):
    made = settings()
    train(made)
    record = next(record for record in read_metrics(made.layout.metrics) if record["event"] == "step")
    assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
    assert 0.05 < record["memory_gib"] < 64
    assert record["clipped"] == (record["gradient_norm"] > made.optimiser.clip_norm)
    shutil.rmtree(made.layout.directory)


def test_frozen_biases_do_not_count_in_the_gradient_norm(settings):
    """With a clip norm this small every step is clipped, so a norm that counts more would shorten the others' steps."""
    section = OptimiserSection(learning_rate=0.05, clip_norm=1e-3)
    made = settings(optimiser=section, steps=2, validate_every=100)
    task = Regression(section)
    task.optimiser.param_groups[-1]["routers"] = ROUTERS.model_copy(update={"freeze_bias_at": 0.0})
    run_steps(task, made)
    expected = Regression(section)
    expected.loss(0).backward()
    kept = [expected.parameters[name].grad for name in ("layer.weight", "layer.bias")]
    norm = torch.cat([gradient.flatten() for gradient in kept if gradient is not None]).norm()
    found = next(record for record in read_metrics(made.layout.metrics) if record["event"] == "step")
    assert found["gradient_norm"] == pytest.approx(float(norm))
