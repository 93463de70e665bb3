"""The loop with a small task: continuing is exact at every step, and nothing bad is trained on, lost or hidden."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_ray.config import AveragingSection, EarlyStopSection, OptimiserSection, RoutersSection, ScheduleSection
from nexus_ray.errors import ArtefactError, NexusError, StorageError
from nexus_ray.layout import RunLayout
from nexus_ray.training import checkpointing, trainer
from nexus_ray.training.checkpointing import load_checkpoint
from nexus_ray.training.loop import run_steps
from nexus_ray.training.optimiser import build_optimiser
from nexus_ray.training.recovery import newest
from nexus_ray.training.settings import LoopSettings
from nexus_ray.training.watching.metrics import MetricsLog, read_metrics

pytestmark = pytest.mark.usefixtures("alone")
STEPS = 12
ROUTERS = RoutersSection(train="bias", bias_learning_rate_factor=0.5, freeze_bias_at=0.5)


class Regression:
    """Least squares whose data are a function of the step; stops like a killed process where it is told to."""

    def __init__(self, optimiser: OptimiserSection, stop_before: int | None = None) -> None:
        torch.manual_seed(0)
        self.parameters = {
            "layer.weight": nn.Parameter(torch.randn(3, 4)),
            "layer.bias": nn.Parameter(torch.zeros(3)),
            "routers.0.bias": nn.Parameter(torch.zeros(3)),
        }
        self.initial = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimiser = build_optimiser(self.parameters, optimiser, ROUTERS)
        self.stop_before = stop_before
        self.bad: dict[int, float] = {}
        self.validations: list[float] = []
        self.taken: list[int] = []

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        inputs, labels = torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)
        layer = self.parameters
        outputs = inputs @ layer["layer.weight"].T + layer["layer.bias"] + layer["routers.0.bias"]
        return (outputs - labels).square().mean() * self.bad.get(step, 1.0)

    def accumulate(self, step: int) -> dict[str, Any]:
        if step == self.stop_before:
            raise KeyboardInterrupt
        self.taken.append(step)
        loss = self.loss(step)
        loss.backward()
        return {"loss": float(loss.detach()), "tokens": 8}

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        return {"loss": self.validations.pop(0) if self.validations else float(self.loss(1000))}

    def initial_weights(self) -> dict[str, Tensor]:
        return self.initial

    def not_finite(self, step: int) -> list[str]:
        return [f"play {step}"]

    def samples(self) -> list[dict[str, str]]:
        return [{"prompt": "To be", "text": "or not"}]


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., LoopSettings]:
    def make(name: str = "run", **changes: Any) -> LoopSettings:
        schedule = ScheduleSection(warmup=0.5, decay=0.25)
        values = {
            "steps": STEPS,
            "optimiser": OptimiserSection(learning_rate=0.05, weight_decay=0.1, schedule=schedule),
            "validate_every": 5,
            "checkpoint_every": 3,
            "keep_checkpoints": 2,
            "layout": RunLayout(tmp_path / name),
        }
        return LoopSettings(**{**values, **changes})

    return make


def train(settings: LoopSettings, stop_before: int | None = None, **task: Any) -> Regression:
    """Run to the end, or up to a sudden death."""
    found = Regression(settings.optimiser, stop_before)
    for name, value in task.items():
        setattr(found, name, value)
    try:
        run_steps(found, settings)
    except KeyboardInterrupt:
        assert stop_before is not None
    return found


def events(settings: LoopSettings) -> list[tuple[str, int]]:
    return [(record["event"], record["step"]) for record in read_metrics(settings.layout.metrics)]


def assert_same(found: Regression, expected: Regression) -> None:
    for name, parameter in expected.parameters.items():
        assert torch.equal(found.parameters[name], parameter), name


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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_training_and_names_the_sequences(settings, value):
    made = settings()
    with pytest.raises(NexusError, match=r"step 7: .*sequences play 7; nothing was updated") as caught:
        train(made, bad={7: value})
    assert "train.on_nan=skip" in str(caught.value)
    assert "after 5 steps" in str(caught.value), "the last good weights are named"
    last, _ = newest(made.layout.checkpoints)
    assert last is not None
    assert last.name == "step-00000006"
    stopped = read_metrics(made.layout.metrics)[-1]
    assert stopped["event"] == "stopped"
    assert "play 7" in stopped["reason"]


def test_such_a_step_can_be_skipped(settings):
    made = settings(on_nan="skip")
    task = train(made, bad={7: math.nan})
    assert all(bool(torch.isfinite(parameter).all()) for parameter in task.parameters.values())
    skipped = [record for record in read_metrics(made.layout.metrics) if record["event"] == "skipped"]
    assert [(record["step"], record["sequences"]) for record in skipped] == [(7, ["play 7"])]
    steps = [record["step"] for record in read_metrics(made.layout.metrics) if record["event"] == "step"]
    assert steps == [step for step in range(STEPS) if step != 7]


def test_checkpoints_of_steps_without_a_gradient_take_no_place(settings):
    """The weights may be what is broken: the good checkpoints before must not be rotated away."""
    made = settings(on_nan="skip", checkpoint_every=1)
    with pytest.raises(NexusError, match="in the 9 steps before it"):
        train(made, bad=dict.fromkeys(range(2, STEPS), math.nan))
    assert sorted(path.name for path in made.layout.checkpoints.iterdir()) == ["step-00000001", "step-00000002"]


def test_too_many_skipped_steps_in_a_row_stop_it_all_the_same(settings):
    made = settings(on_nan="skip")
    with pytest.raises(NexusError, match="as in the 9 steps before it"):
        train(made, bad=dict.fromkeys(range(2, STEPS), math.nan))


def test_a_diverging_loss_is_stopped_and_the_last_good_weights_are_named(settings):
    rising = {step: 1.0 + max(0, step - 25) for step in range(60)}
    made = settings(steps=60)
    with pytest.raises(NexusError, match="diverges") as caught:
        train(made, bad=rising)
    assert str(made.layout.best) in str(caught.value)
    assert "learning_rate" in str(caught.value)


def test_divergence_is_judged_by_what_means_the_same_at_every_step(settings):
    """A loss that rises because its weight does is no divergence."""

    class Scheduled(Regression):
        def accumulate(self, step: int) -> dict[str, Any]:
            return super().accumulate(step) | {"watched": 1.0}

    made = settings(steps=60)
    task = Scheduled(made.optimiser)
    task.bad = {step: 1.0 + max(0, step - 25) for step in range(60)}
    run_steps(task, made)
    assert "watched" not in read_metrics(made.layout.metrics)[0]


@pytest.mark.parametrize(("watched", "ends"), [(None, True), (1.0, False)])
def test_where_no_step_means_the_same_as_another_validations_judge(settings, watched, ends):
    """Otherwise they do not: a validation loss that rises while that of the steps falls is no divergence."""

    class Scheduled(Regression):
        def accumulate(self, step: int) -> dict[str, Any]:
            return super().accumulate(step) | {"watched": watched}

    made = settings(validate_every=1)
    task = Scheduled(made.optimiser)
    task.validations = [3.0, 2.5, 4.4, 4.6]
    if ends:
        with pytest.raises(NexusError, match=r"the validation loss is around 4\.60 nats, it was 2\.50"):
            run_steps(task, made)
    else:
        run_steps(task, made)
    assert len(task.taken) == (4 if ends else STEPS)


def test_a_validation_loss_that_is_no_number_stops_the_training(settings):
    made = settings(validate_every=1)
    with pytest.raises(NexusError, match="step 1: the validation loss is nan") as caught:
        train(made, validations=[2.0, math.nan])
    assert "after 1 steps" in str(caught.value)


def test_a_validation_loss_that_is_no_number_is_not_the_best_where_such_are_passed_over(settings):
    made = settings(validate_every=4, on_nan="skip")
    train(made, validations=[math.nan, 2.0, 3.0])
    assert load_checkpoint(made.layout.best, {})["step"] == 8
    warnings = [record for record in read_metrics(made.layout.metrics) if record["event"] == "warning"]
    assert [(record["kind"], record["step"]) for record in warnings] == [("validation", 3)]


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


def test_why_it_stopped_is_told_although_the_disk_is_full_too(settings, monkeypatch):
    write = MetricsLog.write

    def full(self: MetricsLog, event: str, step: int, **values: Any) -> None:
        if event == "stopped":
            raise StorageError("the disk is full", "free some of it")
        write(self, event, step, **values)

    monkeypatch.setattr(MetricsLog, "write", full)
    with pytest.raises(NexusError, match="play 7"):
        train(settings(), bad={7: math.nan})


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
