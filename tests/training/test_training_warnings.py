"""Warnings: what is seen, what to do, once until it has recovered, and the same after a resume."""

from __future__ import annotations

from typing import Any

import pytest

from nexus_ray.config import WarningsSection, flatten
from nexus_ray.training.watching.warnings import Warnings

ROLES = {"play": "domain", "prose": "retention", "code": "retention"}
BOUNDS = WarningsSection(router_kl=0.2, overlap=0.8, clipped=0.5, entropy=0.5, retention=0.1)


def watch() -> Warnings:
    return Warnings(BOUNDS, ROLES)


def step(number: int = 0, **values: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, **values}


def routers(**values: Any) -> dict[str, Any]:
    return step(router=values)


def validation(**losses: float) -> dict[str, Any]:
    base = {"play": 7.0, "prose": 3.0, "code": 2.0}
    return {"event": "validation", "step": 0, "losses": losses, "base_losses": base}


def kinds(watched: Warnings, *records: dict[str, Any]) -> list[list[str]]:
    return [[warning["kind"] for warning in watched.see(record)] for record in records]


QUIET = routers(kl=[0.1, 0.1], overlap=[0.9, 0.9], entropy=[1.0, 1.0], teacher_entropy=[1.1, 1.1])


def test_a_training_that_is_well_gives_no_warnings():
    records = [QUIET, step(clipped=False), validation(play=6.0, prose=3.05, code=1.9)]
    assert kinds(watch(), *records * 60) == [[]] * 180


def test_router_kl_above_the_bound_names_its_value_the_worst_layer_and_the_settings():
    (warning,) = watch().see(routers(kl=[0.1, None, 0.5]))
    assert (warning["kind"], warning["value"], warning["bound"]) == ("router_kl", pytest.approx(0.3), 0.2)
    assert "0.3 nats a token, most in layer 2 (0.5)" in warning["message"]
    assert "train.warnings.router_kl is 0.2" in warning["message"]
    assert "router_kl" in warning["hint"]
    assert "train.optimiser.learning_rate" in warning["hint"]


def test_too_few_common_experts_are_told():
    (warning,) = watch().see(routers(overlap=[0.9, 0.5]))
    assert warning["kind"] == "overlap"
    assert "70% of the base's selected experts" in warning["message"]
    assert "layer 1 (50%)" in warning["message"]


def test_one_unusual_step_is_no_drift():
    watched = watch()
    kinds(watched, *[QUIET] * 9)
    assert kinds(watched, routers(kl=[0.9, 0.9], entropy=[1.0, 1.0])) == [[]]


def test_entropy_is_compared_with_the_teachers_in_the_worst_layer():
    (warning,) = watch().see(routers(entropy=[1.0, 0.4], teacher_entropy=[1.0, 1.0]))
    assert warning["kind"] == "entropy"
    assert "layer 1 keep 40%" in warning["message"]


def test_entropy_without_a_teacher_is_compared_with_what_it_was_at_first():
    watched = watch()
    assert kinds(watched, routers(entropy=[2.0, 1.0])) == [[]]
    assert ["entropy"] in kinds(watched, *[routers(entropy=[0.5, 1.0])] * 10)


def test_validations_are_judged_where_only_they_know_the_bases_routers():
    drifted = validation(play=6.0) | {"router": {"kl": [0.9], "entropy": [1.0], "teacher_entropy": [1.0]}}
    bare = routers(entropy=[0.1])
    assert kinds(watch(), bare, drifted, bare, drifted) == [[], ["router_kl"], [], []]
    near = validation(play=6.0) | {"router": {"kl": [0.1], "entropy": [1.0], "teacher_entropy": [1.0]}}
    assert kinds(watch(), drifted, near, drifted) == [["router_kl"], [], ["router_kl"]]


def test_steps_are_judged_where_they_know_the_bases_routers():
    drifted = validation(play=6.0) | {"router": {"kl": [0.9]}}
    assert kinds(watch(), QUIET, drifted) == [[], []]


def test_clipping_is_judged_by_the_last_fifty_steps():
    watched = watch()
    seen = kinds(watched, *[step(clipped=True)] * 49)
    assert seen == [[]] * 49
    assert kinds(watched, step(clipped=True)) == [["clipped"]]


def test_retention_sources_are_compared_with_the_base_and_the_domain_is_not():
    assert kinds(watch(), validation(play=9.0, prose=3.2, code=2.05)) == [["retention/prose"]]


def test_retention_without_the_bases_losses_says_nothing():
    record = validation(prose=9.0)
    del record["base_losses"]
    assert kinds(watch(), record) == [[]]


def test_the_bases_losses_are_remembered():
    watched = watch()
    watched.see(validation(prose=3.0))
    assert kinds(watched, {"event": "validation", "step": 9, "losses": {"prose": 3.5}}) == [["retention/prose"]]


def test_a_warning_comes_once_until_it_has_recovered():
    bad, barely, good = validation(prose=3.2), validation(prose=3.099), validation(prose=3.0)
    watched = watch()
    assert kinds(watched, bad, bad, barely, bad, good, bad) == [
        ["retention/prose"],
        [],
        [],
        [],
        [],
        ["retention/prose"],
    ]


@pytest.mark.parametrize("cut", range(0, 120, 13))
def test_a_resumed_run_warns_as_one_that_was_never_stopped(cut: int):
    records = [step(number, clipped=number % 50 < 30, router={"kl": [number % 40 / 50]}) for number in range(120)]
    whole, resumed = watch(), watch()
    expected = kinds(whole, *records)
    assert sum(map(len, expected)) > 2
    kinds(resumed, *records[:cut])
    assert kinds(resumed, *records[cut:]) == expected[cut:]


def test_other_events_and_bare_records_are_read_over():
    records = [{"event": "resume", "step": 3}, step(loss=1.0), step(router={}), {"event": "validation", "step": 1}]
    assert kinds(watch(), *records) == [[]] * 4


def test_every_bound_that_a_warning_names_exists():
    records = [*[step(clipped=True)] * 50, routers(kl=[9.0], overlap=[0.0], entropy=[0.1], teacher_entropy=[9.0])]
    watched = watch()
    found = [warning for record in [*records, validation(prose=9.0)] for warning in watched.see(record)]
    assert len({warning["kind"] for warning in found}) == 5
    known = set(flatten(BOUNDS))
    for warning in found:
        named = warning["message"].split("train.warnings.")[1].split()[0]
        assert named in known
