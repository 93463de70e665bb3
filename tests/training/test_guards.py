"""Divergence, the best validation and early stopping, as pure bookkeeping that a checkpoint can hold."""

from __future__ import annotations

import json
import math

import pytest

from nexus_ray.config import EarlyStopSection
from nexus_ray.training.guards import Progress


def first_alarm(losses: list[float]) -> int | None:
    progress = Progress()
    return next((step for step, loss in enumerate(losses) if progress.is_diverging(loss)), None)


def test_a_falling_or_noisy_loss_does_not_diverge():
    falling = [9 - 0.05 * step + math.sin(step) for step in range(120)]
    assert first_alarm(falling) is None
    assert first_alarm([3.0, 8.0] * 40) is None
    assert first_alarm([1e-3] * 30 + [0.05] * 60) is None, "a loss that starts near zero may rise"


def test_a_loss_that_runs_away_is_noticed_within_twenty_steps():
    alarm = first_alarm([5.0] * 40 + [5.0 + 0.5 * step for step in range(60)])
    assert alarm is not None
    assert 40 < alarm < 60


def test_one_outlier_is_no_divergence():
    assert first_alarm([5.0] * 30 + [40.0] + [5.0] * 30) is None


def test_the_watch_continues_across_a_checkpoint():
    losses = [5.0] * 30 + [6.0 + 0.2 * step for step in range(40)]
    progress = Progress()
    alarms = []
    for loss in losses:
        progress = Progress.of_state(json.loads(json.dumps(progress.as_state())))
        alarms.append(progress.is_diverging(loss))
    assert alarms.index(True) == first_alarm(losses)


def validate(losses: list[float], **section: float) -> tuple[list[bool], Progress]:
    progress = Progress()
    best = []
    for loss in losses:
        progress.step += 10
        best.append(progress.is_best(loss, EarlyStopSection(**section)))
        if progress.ended:
            break
    return best, progress


def test_the_lowest_validation_is_the_best():
    best, progress = validate([3.0, 2.0, 2.5, 1.9, math.nan, 4.0])
    assert best == [True, True, False, True, False, False]
    assert (progress.best, progress.best_step) == (1.9, 40)
    assert not progress.ended, "without patience training takes all its steps"


@pytest.mark.parametrize(("patience", "ended_after"), [(1, 3), (2, 6), (3, 7)])
def test_patience_counts_validations_since_the_best(patience, ended_after):
    best, progress = validate([3.0, 2.0, 2.5, 1.9, 2.0, 2.1, 2.2, 1.0], patience=patience)
    assert len(best) == ended_after
    assert progress.ended


def test_a_gain_smaller_than_asked_for_is_kept_but_does_not_count():
    best, progress = validate([3.0, 2.99, 2.98, 2.97], patience=2, min_gain=0.1)
    assert best == [True, True, True]
    assert progress.ended


def test_small_gains_add_up():
    best, progress = validate([3.0, 2.94, 2.88, 2.82, 2.76], patience=2, min_gain=0.1)
    assert best == [True] * 5
    assert not progress.ended


def test_what_another_version_remembered_besides_is_passed_over():
    assert Progress.of_state({"step": 7, "best": 1.5, "mood": "good"}) == Progress(step=7, best=1.5)


def test_a_validation_that_is_no_number_is_never_the_best():
    best, progress = validate([math.nan, 2.0])
    assert best == [False, True]
    assert progress.best == 2.0
