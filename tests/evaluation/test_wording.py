"""The words of a report say what the confidence interval supports, and no more."""

from __future__ import annotations

import pytest
from evaluation.synthetic import evaluation, source_result

from nexus_ray.evaluation.wording import (
    Outcome,
    change,
    classify,
    damage_bound,
    duration,
    headline,
    number,
    size,
    supported_bound,
    verdict,
)

KEPT = (51.0, 51.1, (0.995, 1.009))


def test_helped_and_kept():
    text = headline(evaluation((1126.0, 106.0, (0.092, 0.097)), KEPT), 0.95)
    assert text.startswith("**The overlay helped on the domain.**")
    assert "On play (domain) perplexity fell by 90.6 %, from 1,126 to 106 (95 % CI -90.8 % to -90.3 %)." in text
    assert "On prose (retention) no difference could be shown" in text
    assert "which includes no change); within 1 % of the base." in text
    assert text.index("play") < text.index("prose")


def test_helped_at_a_bounded_cost():
    text = headline(evaluation((50.0, 40.0, (0.78, 0.82)), (51.0, 51.6, (1.005, 1.018))), 0.9)
    assert text.startswith("**The overlay helped on the domain, at a cost within 2 % on retention text (prose).**")
    assert "On prose (retention) perplexity rose by 1.2 %, from 51.0 to 51.6" in text
    assert "90 % CI" in text


def test_helped_and_broke_something():
    text = headline(evaluation((50.0, 40.0, (0.78, 0.82)), (51.0, 103.0, (1.9, 2.1))), 0.95)
    assert text.startswith("**The overlay helped on the domain, and made retention text clearly worse (prose).**")
    assert "rose by 102.0 %" in text
    assert "a loss of more than 10 % is not ruled out" in text


def test_not_distinguishable():
    text = headline(evaluation((50.0, 49.5, (0.96, 1.03)), KEPT), 0.95)
    assert text.startswith("**No difference on the domain could be shown.**")
    assert "On play (domain) no difference could be shown: perplexity from 50.0 to 49.5, -1.0 %" in text
    assert "fell" not in text
    assert "within 5 %" in text


def test_got_worse():
    text = headline(evaluation((50.0, 55.0, (1.06, 1.14)), KEPT), 0.95)
    assert text.startswith("**The overlay made the domain worse.**")
    assert "perplexity rose by 10.0 %" in text
    assert "helped" not in text


def test_equal_to_the_base():
    text = headline(evaluation((50.0, 50.0, (1.0, 1.0)), (51.0, 51.0, (1.0, 1.0))), 0.95)
    assert text.startswith("**The student equals the base on the domain.**")
    assert "CI" not in text


def test_domains_that_disagree_and_a_domain_that_is_missing():
    better, worse = source_result("domain", 50, 40, (0.7, 0.9)), source_result("domain", 50, 60, (1.1, 1.3))
    assert verdict({"a": better, "b": worse}).startswith("Mixed")
    assert "not scored" in verdict({"a": source_result("retention", 50, 50, (1.0, 1.0))})


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [
        ((0.9, 0.999), Outcome.BETTER),
        ((1.001, 1.1), Outcome.WORSE),
        ((0.9, 1.0), Outcome.UNCLEAR),
        ((1.0, 1.1), Outcome.UNCLEAR),
        ((1.0, 1.0), Outcome.EQUAL),
    ],
)
def test_a_difference_needs_an_interval_that_excludes_one(interval: tuple[float, float], outcome: Outcome):
    assert classify(interval) is outcome


@pytest.mark.parametrize(
    ("interval", "bound"),
    [((0.995, 1.0099), 1), ((0.995, 1.0101), 2), ((0.979, 1.0), 5), ((0.95, 1.09), 10), ((0.5, 0.99), None)],
)
def test_within_a_percentage_needs_the_whole_interval(interval: tuple[float, float], bound: int | None):
    assert supported_bound(interval) == bound


def test_numbers_as_people_write_them():
    assert [number(value) for value in (1126.4, 51.04, 3.214, 0.0321)] == ["1,126", "51.0", "3.21", "0.0321"]
    assert [change(ratio) for ratio in (0.094, 1.0123, 1.0012)] == ["-90.6 %", "+1.2 %", "+0.12 %"]
    assert [duration(seconds) for seconds in (4.21, 42.4, 185, 7800)] == ["4.2 s", "42 s", "3 min 5 s", "2 h 10 min"]
    assert [size(amount) for amount in (812, 257_749, 1.2e9)] == ["812 bytes", "257.7 kB", "1.2 GB"]


@pytest.mark.parametrize(
    ("interval", "bound"),
    [((0.5, 0.9), 1), ((0.85, 1.004), 1), ((0.85, 1.015), 2), ((1.02, 1.04), 5), ((0.9, 1.1001), None)],
)
def test_only_the_upper_end_of_an_interval_is_damage(interval: tuple[float, float], bound: int | None):
    assert damage_bound(interval) == bound


def test_an_improvement_that_could_not_be_shown_is_not_held_against_the_student():
    text = headline(evaluation((50.0, 47.0, (0.85, 1.004)), KEPT), 0.95)
    assert "which includes no change); at most 1 % worse." in text
    assert "10 %" not in text


def test_a_large_improvement_on_retention_text_is_one():
    text = headline(evaluation((50.0, 40.0, (0.78, 0.82)), (51.0, 45.9, (0.88, 0.92))), 0.95)
    assert text.startswith("**The overlay helped on the domain, and improved retention text (prose).**")
    assert "On prose (retention) perplexity fell by 10.0 %" in text
    assert "cost" not in text
    assert "worse" not in text


@pytest.mark.parametrize(
    ("domain", "begins"),
    [
        ((50.0, 49.5, (0.96, 1.03)), "No difference on the domain could be shown"),
        ((50.0, 55.0, (1.06, 1.14)), "The overlay made the domain worse"),
        ((50.0, 50.0, (1.0, 1.0)), "The student equals the base on the domain"),
    ],
)
def test_damage_to_retention_text_is_named_whatever_became_of_the_domain(domain: tuple, begins: str):
    found = verdict(evaluation(domain, (51.0, 103.0, (1.9, 2.1))))
    assert found == f"{begins}, and made retention text clearly worse (prose)."


def test_each_source_is_named_with_what_became_of_it():
    results = evaluation((50.0, 40.0, (0.78, 0.82)), (51.0, 51.6, (1.005, 1.018)))
    results["code"] = source_result("retention", 10, 12, (1.15, 1.25))
    results["speeches"] = source_result("retention", 10, 9, (0.88, 0.92))
    assert verdict(results) == (
        "The overlay helped on the domain, at a cost within 2 % on retention text (prose), "
        "and made retention text clearly worse (code), and improved retention text (speeches)."
    )
