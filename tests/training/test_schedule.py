"""Learning-rate schedules against points in closed form."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar

import pytest

from nexus_ray.config import OptimiserSection, RoutersSection, ScheduleSection
from nexus_ray.training.schedule import biases_are_frozen, learning_rate, learning_rates

STEPS, PEAK = 1000, 3e-3


def curve(steps: int = STEPS, **schedule: object) -> list[float]:
    section = ScheduleSection.model_validate(schedule)
    return [learning_rate(step, steps, PEAK, section) for step in range(steps)]


class TestClosedForm:
    """Warm-up 10 %, stable to 60 %, decay to a tenth of the peak. Values are those after the step's share."""

    SHAPE: ClassVar = {"warmup": 0.1, "decay": 0.4, "floor": 0.1}

    @pytest.mark.parametrize("shape", ["cosine", "linear"])
    def test_warmup_and_plateau(self, shape):
        rates = curve(**self.SHAPE, shape=shape)
        assert rates[0] == pytest.approx(PEAK / 100)
        assert rates[49] == pytest.approx(PEAK / 2)
        assert rates[99:600] == pytest.approx([PEAK] * 501)

    @pytest.mark.parametrize(
        ("shape", "quarter"), [("cosine", (1 + math.sqrt(0.5)) / 2), ("linear", 0.75)], ids=["cosine", "linear"]
    )
    def test_decay(self, shape, quarter):
        rates = curve(**self.SHAPE, shape=shape)
        assert rates[699] == pytest.approx(PEAK * (0.1 + 0.9 * quarter))
        assert rates[799] == pytest.approx(PEAK * 0.55), "both shapes are half way down in the middle"
        assert rates[999] == pytest.approx(PEAK * 0.1)


def bounded_rise_and_fall(rates: list[float]) -> bool:
    top = rates.index(max(rates))
    rises = rates[: top + 1] == sorted(rates[: top + 1])
    falls = rates[top:] == sorted(rates[top:], reverse=True)
    return rises and falls and min(rates) >= 0 and max(rates) <= PEAK


@pytest.mark.parametrize("shape", ["cosine", "linear"])
@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (0, 1), (1, 0), (0.3, 0.7), (0.05, 0.5), (0.123, 0.456)])
@pytest.mark.parametrize("steps", [2, 7, 160, 1000])
class TestEverySchedule:
    FLOORS = (0.0, 0.1, 1.0)

    def test_it_rises_then_stays_then_falls_within_its_bounds(self, steps, warmup, decay, shape):
        for floor in self.FLOORS:
            assert bounded_rise_and_fall(curve(steps, warmup=warmup, decay=decay, shape=shape, floor=floor))

    def test_it_has_no_jumps(self, steps, warmup, decay, shape):
        """One step moves by at most its part of a ramp, half of pi times that where the cosine is steepest."""
        ramps = [part * steps for part in (warmup, decay) if part]
        largest = PEAK * sum(math.pi / 2 / ramp for ramp in ramps) * (1 + 1e-9)
        for floor in self.FLOORS:
            rates = curve(steps, warmup=warmup, decay=decay, shape=shape, floor=floor)
            assert all(abs(after - before) <= largest for before, after in pairwise(rates))

    def test_it_ends_at_the_floor(self, steps, warmup, decay, shape):
        for floor in self.FLOORS:
            last = curve(steps, warmup=warmup, decay=decay, shape=shape, floor=floor)[-1]
            assert last == pytest.approx(PEAK * (floor if decay else 1.0), abs=1e-12)


def test_a_single_step_is_taken_at_the_peak():
    """Its warm-up is over as it begins; nothing would be learned at a rate of 0."""
    assert curve(1, warmup=0.05, decay=0.5, floor=0.0) == [PEAK]


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_a_constant_schedule_stays_at_the_peak_after_its_warm_up(decay):
    rates = curve(warmup=0.2, decay=decay, shape="constant", floor=0.1)
    assert rates[:200] == pytest.approx([PEAK * (step + 1) / 200 for step in range(200)])
    assert rates[200:] == [PEAK] * 800


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ("none", {"learning_rate"}),
        ("bias", {"learning_rate", "router_bias_learning_rate"}),
        ("all", {"learning_rate", "router_learning_rate", "router_bias_learning_rate"}),
    ],
)
def test_only_what_is_trained_has_a_learning_rate(train, names):
    assert learning_rates(3, 10, OptimiserSection(), RoutersSection(train=train)).keys() == names
    assert learning_rates(3, 10, OptimiserSection()).keys() == {"learning_rate"}


def test_router_rates_are_shares_of_the_learning_rate_until_biases_freeze():
    section = OptimiserSection(learning_rate=PEAK)
    routers = RoutersSection(train="all", learning_rate_factor=0.5, bias_learning_rate_factor=0.001, freeze_bias_at=0.8)
    for step in range(STEPS):
        rates = learning_rates(step, STEPS, section, routers)
        rate = learning_rate(step, STEPS, PEAK, section.schedule)
        assert rates["learning_rate"] == rate
        assert rates["router_learning_rate"] == rate / 2
        assert rates["router_bias_learning_rate"] == (rate * 0.001 if step < 800 else 0.0)
        assert biases_are_frozen(step, STEPS, routers) is (step >= 800)


def test_biases_that_are_never_frozen_learn_in_the_last_step():
    assert not biases_are_frozen(STEPS - 1, STEPS, RoutersSection(train="bias"))
