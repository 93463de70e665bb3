"""The objective as a function of how much of the run is over, and the positions that its terms are means over."""

from __future__ import annotations

import random

import pytest

from nexus_ray.config import LOSSES, RoutersSection, Scheduled, TrainSection, TrainSourceSection
from nexus_ray.training.losses.objective import Objective, objective_at, shares, term_counts

WARMING = Scheduled(((0.0, 0.0), (0.4, 2.0)))
ENDING = Scheduled(((0.5, 1.0), (1.0, 0.0)))
TRAIN = TrainSection(
    sources={
        "play": TrainSourceSection(sequences_per_step=2, cross_entropy=1.0, router_kl=WARMING),
        "prose": TrainSourceSection(sequences_per_step=2, output_kl=ENDING, load_balancing=0.1),
    },
    routers=RoutersSection(train="all"),
    router_temperature=Scheduled(((0.3, 4.0), (1.0, 2.0))),
    output_temperature=Scheduled(3.0),
    output_divergence="jsd",
    jsd_beta=0.2,
)
TOKENS = {"play": 100, "prose": 30}
TARGETS = {"play": 90, "prose": 20}
ROUTED = {"play": 50, "prose": 0}


def counts_at(share: float) -> dict[str, int]:
    return term_counts(objective_at(TRAIN, share).weights, TARGETS, ROUTED, TOKENS)


@pytest.mark.parametrize(
    ("share", "router_kl", "output_kl", "temperature"),
    [(0.0, 0.0, 1.0, 4.0), (0.2, 1.0, 1.0, 4.0), (0.65, 2.0, 0.7, 3.0), (1.0, 2.0, 0.0, 2.0)],
)
def test_weights_and_temperatures_follow_their_schedules(
    share: float, router_kl: float, output_kl: float, temperature: float
) -> None:
    objective = objective_at(TRAIN, share)
    assert objective.weights["play"] == pytest.approx({"cross_entropy": 1.0, "router_kl": router_kl})
    assert objective.weights["prose"] == pytest.approx({"output_kl": output_kl, "load_balancing": 0.1})
    assert objective.router_temperature == pytest.approx(temperature)
    assert (objective.output_temperature, objective.divergence, objective.jsd_beta) == (3.0, "jsd", 0.2)


def test_it_depends_on_the_share_alone_not_on_what_was_asked_before() -> None:
    steps = list(range(160))
    in_order: list[Objective] = [objective_at(TRAIN, step / 160) for step in steps]
    random.Random(0).shuffle(steps)
    assert all(objective_at(TRAIN, step / 160) == in_order[step] for step in steps)


def test_a_source_has_exactly_the_terms_that_it_was_ever_given_a_weight_for() -> None:
    for loss in LOSSES:
        source = TrainSourceSection(sequences_per_step=1, **{loss: 0.5})
        train = TrainSection(sources={"a": source}, routers=RoutersSection(train="all"))
        assert objective_at(train, 0.5).weights == {"a": {loss: 0.5}}


def test_the_counts_do_not_jump_when_a_weight_begins_or_ends() -> None:
    expected = {"cross_entropy": 90, "output_kl": 20, "hidden_mse": 0}
    expected |= {"router_kl": 50, "load_balancing": 30, "router_z": 0}
    assert [counts_at(share) for share in (0.0, 0.001, 0.5, 1.0)] == [expected] * 4


def test_a_source_without_a_term_does_not_dilute_its_mean() -> None:
    objective, counts = objective_at(TRAIN, 0.2), counts_at(0.2)
    assert shares(objective.weights["play"], counts) == pytest.approx({"cross_entropy": 1 / 90, "router_kl": 1 / 50})
    assert shares(objective.weights["prose"], counts) == pytest.approx(
        {"output_kl": 1 / 20, "load_balancing": 0.1 / 30}
    )


def test_sources_that_share_a_term_share_its_mean() -> None:
    weights = {"play": {"hidden_mse": 1.0, "router_z": 1.0}, "prose": {"hidden_mse": 3.0, "router_z": 2.0}}
    counts = term_counts(weights, TARGETS, ROUTED, TOKENS)
    assert (counts["hidden_mse"], counts["router_z"]) == (90 + 20, 100 + 30)
    assert shares(weights["prose"], counts) == pytest.approx({"hidden_mse": 3 / 110, "router_z": 2 / 130})


def test_a_batch_without_positions_of_a_term_divides_by_nothing() -> None:
    weights = {"prose": {"router_kl": 2.0}}
    counts = term_counts(weights, {"prose": 0}, {"prose": 0}, {"prose": 0})
    assert shares(weights["prose"], counts) == {"router_kl": 2.0}
