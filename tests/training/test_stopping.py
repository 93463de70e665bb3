"""What stops a training: losses that are not finite or run away, and what it says then."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from regression import STEPS, Regression, train

from nexus_ray.errors import NexusError, StorageError
from nexus_ray.training.checkpointing import load_checkpoint
from nexus_ray.training.loop import run_steps
from nexus_ray.training.recovery import newest
from nexus_ray.training.watching.metrics import MetricsLog, read_metrics

pytestmark = pytest.mark.usefixtures("alone")


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


def test_why_it_stopped_is_told_although_the_disk_is_full_too(settings, monkeypatch):
    write = MetricsLog.write

    def full(self: MetricsLog, event: str, step: int, **values: Any) -> None:
        if event == "stopped":
            raise StorageError("the disk is full", "free some of it")
        write(self, event, step, **values)

    monkeypatch.setattr(MetricsLog, "write", full)
    with pytest.raises(NexusError, match="play 7"):
        train(settings(), bad={7: math.nan})
