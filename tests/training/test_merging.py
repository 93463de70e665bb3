"""Averaging with an anchor: merged = alpha * anchor + (1 - alpha) * current, and what each anchor does in time."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from nexus_ray.config import AveragingSection
from nexus_ray.errors import ArtefactError
from nexus_ray.training import averaging
from nexus_ray.training.averaging import Averaging
from nexus_ray.training.checkpointing import load_checkpoint, take_snapshot, write_snapshot

ALPHA = 0.25


def weights(value: float) -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.full((3,), value)), "b": nn.Parameter(torch.full((2, 2), -value))}


def averaging_of(parameters: Mapping[str, nn.Parameter], anchor: str, every: int = 2) -> Averaging:
    initial = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    section = AveragingSection(every=every, alpha=ALPHA, anchor=anchor)
    return Averaging(section, parameters, lambda: initial)


def drift(parameters: Mapping[str, nn.Parameter], by: float) -> None:
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(by)


def test_a_merge_is_a_weighted_mean_with_the_anchor():
    parameters = weights(1.0)
    merging = averaging_of(parameters, "initial")
    drift(parameters, 4.0)
    moved = merging.merge()
    torch.testing.assert_close(parameters["a"].detach(), torch.full((3,), ALPHA * 1.0 + (1 - ALPHA) * 5.0))
    torch.testing.assert_close(parameters["b"].detach(), torch.full((2, 2), ALPHA * -1.0 + (1 - ALPHA) * 3.0))
    assert moved == pytest.approx((7 * 1.0) ** 0.5)


def test_merges_come_at_their_own_interval():
    merging = averaging_of(weights(0.0), "initial", every=3)
    assert [step for step in range(10) if merging.is_due(step)] == [2, 5, 8]
    never = Averaging(AveragingSection(), weights(0.0), dict)
    assert not any(never.is_due(step) for step in range(10))


@pytest.mark.parametrize(("anchor", "bounded"), [("initial", True), ("previous", False)])
def test_the_initial_anchor_bounds_how_far_a_steady_drift_goes_and_the_previous_one_does_not(anchor, bounded):
    """With steps of d between merges the distance has the fixed point (1 - alpha) d / alpha from the initial anchor;
    from the previous one it grows by (1 - alpha) d each time, which is Lookahead."""
    parameters = weights(0.0)
    merging = averaging_of(parameters, anchor)
    for _ in range(60):
        drift(parameters, 1.0)
        merging.merge()
    expected = (1 - ALPHA) / ALPHA if bounded else 60 * (1 - ALPHA)
    torch.testing.assert_close(parameters["a"].detach(), torch.full((3,), expected))


def test_the_previous_anchor_is_part_of_a_checkpoint(tmp_path):
    def run(parameters, merging, times):
        for _ in range(times):
            drift(parameters, 1.0)
            merging.merge()

    whole, parts = weights(0.5), weights(0.5)
    run(whole, averaging_of(whole, "previous"), 5)
    merging = averaging_of(parts, "previous")
    run(parts, merging, 2)
    drift(parts, 0.125)  # in the middle between two merges
    write_snapshot(tmp_path / "c", take_snapshot(parts, {"step": 4}, extra=merging.kept))

    resumed = weights(9.0)
    again = averaging_of(resumed, "previous")
    load_checkpoint(tmp_path / "c", resumed, extra=again.kept)
    drift(resumed, -0.125)
    run(resumed, again, 3)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_initial_anchor_takes_no_memory_and_no_place_in_checkpoints():
    assert averaging_of(weights(1.0), "initial").kept == {}


def broken() -> Mapping[str, Tensor]:
    raise ArtefactError("no overlay there", "make one")


@pytest.mark.parametrize("initial", [broken, lambda: {"a": torch.zeros(3)}], ids=["unreadable", "incomplete"])
def test_without_an_anchor_nothing_is_changed(initial):
    parameters = weights(2.0)
    merging = Averaging(AveragingSection(every=1), parameters, initial)
    with pytest.raises(ArtefactError, match=r"no overlay there|no b"):
        merging.merge()
    assert torch.equal(parameters["a"], torch.full((3,), 2.0))


def test_an_anchor_that_another_worker_lacks_is_used_by_none(monkeypatch):
    monkeypatch.setattr(averaging, "sum_over_workers", lambda values: values + 1)
    parameters = weights(2.0)
    merging = averaging_of(parameters, "initial")
    drift(parameters, 1.0)
    with pytest.raises(ArtefactError, match="1 other workers"):
        merging.merge()
    assert torch.equal(parameters["a"], torch.full((3,), 3.0))


def test_what_is_frozen_is_not_merged():
    parameters = weights(1.0)
    merging = averaging_of(parameters, "initial")
    drift(parameters, 4.0)
    merging.merge(["a"])
    torch.testing.assert_close(parameters["a"].detach(), torch.full((3,), 4.0))
    assert torch.equal(parameters["b"], torch.full((2, 2), 3.0))
