"""What a layer's figures allow to say, in words."""

from dataclasses import replace

import pytest

from nexus_ray.selection.record import NOISE
from nexus_ray.selection.stability import Stability, overlap_p_value
from nexus_ray.selection.verdict import Evidence, judge


def evidence(common: int = 7, top_k: int = 8, experts: int = 16, layers: int = 6) -> Evidence:
    return Evidence(
        experts=experts,
        top_k=top_k,
        layers=layers,
        constant=False,
        identical=False,
        half_tokens=(2000, 1900),
        fewest_tokens=experts + 1,
        stability=Stability(common / top_k, overlap_p_value(common, top_k, experts), 0.8),
        share=0.91,
        null_share=0.95,
        null_share_high=0.96,
        null_name="independent experts",
    )


def test_agreement_that_chance_hardly_gives_is_stable():
    verdict, reason = judge(evidence(common=8))
    assert verdict == "stable"
    assert "agree on 8 of 8 experts" in reason
    assert "agree on 4.0 on average" in reason
    assert "7.8e-05" in reason


def test_agreement_above_chance_on_fewer_is_partly_stable():
    assert judge(evidence(common=14, top_k=24, experts=128))[0] == "partly stable"
    assert judge(evidence(common=18, top_k=24, experts=128))[0] == "stable"


def test_the_level_is_shared_by_the_layers():
    """Seven of eight of sixteen by chance: 0.0051 in one layer, so above 0.05 / 12."""
    assert judge(evidence(common=7, layers=1))[0] == "stable"
    verdict, reason = judge(evidence(common=7, layers=12))
    assert verdict == NOISE
    assert "0.0051" in reason
    assert "below 0.0042" in reason


def test_too_few_experts_to_tell_is_said():
    verdict, reason = judge(evidence(common=2, top_k=2, experts=4))
    assert verdict == NOISE
    assert "too few experts to tell" in reason
    assert "too few experts" not in judge(evidence(common=4))[1]


def test_a_share_below_its_null_is_no_more_concentrated_than_chance():
    verdict, reason = judge(evidence(common=8))
    assert verdict == "stable"
    assert "They hold 91.0 % of the score, no more concentrated than independent experts would be" in reason
    assert "95.0 %" in reason


def test_a_share_above_its_null_is_more_concentrated_than_chance():
    reason = judge(replace(evidence(), share=0.97, null_name="equal experts"))[1]
    assert "They hold 97.0 % of the score, more concentrated than chance" in reason
    assert "the best 8 of equal experts hold 95.0 %" in reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"constant": True}, "same probabilities"),
        ({"identical": True}, "any choice gives the same shared expert"),
        ({"top_k": 16}, "Every one of the 16 experts is selected"),
        ({"stability": None, "half_tokens": (12, 0)}, "the halves hold 12 and 0 tokens"),
    ],
)
def test_where_there_is_nothing_to_compare_perfect_agreement_is_noise(changes, said):
    verdict, reason = judge(replace(evidence(common=8), **changes))
    assert verdict == NOISE
    assert said in reason
    assert "of the score" not in reason


def test_what_is_wrong_with_the_model_is_said_before_what_is_wrong_with_the_text():
    assert "same weights" in judge(replace(evidence(), identical=True, stability=None))[1]
