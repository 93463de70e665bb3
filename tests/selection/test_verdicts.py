"""What a layer's figures allow to say, in words."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from nexus_ray.selection.record import NOISE
from nexus_ray.selection.stability import Stability, overlap_p_value
from nexus_ray.selection.verdict import Evidence, Together, judge, judge_all, judge_together, pooled_p_value


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
    verdict, cause, reason = judge(evidence(common=8))
    assert (verdict, cause) == ("stable", "agreement")
    assert "agree on 8 of 8 experts" in reason
    assert "agree on 4.0 on average" in reason
    assert "7.8e-05" in reason


def test_agreement_above_chance_on_fewer_is_partly_stable():
    assert judge(evidence(common=14, top_k=24, experts=128))[:2] == ("partly stable", "agreement")
    assert judge(evidence(common=18, top_k=24, experts=128))[:2] == ("stable", "agreement")


def test_the_level_is_shared_by_the_layers():
    """Seven of eight of sixteen by chance: 0.0051 in one layer, so above 0.05 / 12."""
    assert judge(evidence(common=7, layers=1))[0] == "stable"
    verdict, cause, reason = judge(evidence(common=7, layers=12))
    assert (verdict, cause) == (NOISE, "chance")
    assert "0.0051" in reason
    assert "below 0.0042" in reason


def test_full_agreement_that_chance_often_gives_is_too_few_experts_and_says_what_was_seen():
    verdict, cause, reason = judge(evidence(common=2, top_k=2, experts=4))
    assert (verdict, cause) == (NOISE, "too_few_experts")
    assert "agree on 2 of 2 experts" in reason
    assert "Choosing 2 of 4 experts, a layer alone cannot tell" in reason
    assert "full agreement would have probability 0.17, and only below 0.0083" in reason


def test_too_many_of_many_experts_are_not_called_too_few():
    """All but one of sixteen: random choices are the same in one of sixteen layers."""
    verdict, cause, reason = judge(evidence(common=15, top_k=15, experts=16))
    assert (verdict, cause) == (NOISE, "too_few_experts")
    assert "Choosing 15 of 16 experts" in reason
    assert "too few experts" not in reason


def test_layers_that_cannot_tell_alone_can_tell_together():
    """8 experts, 4 selected: 1 / 70 in one layer, above 0.05 / 4, but 70^-4 in four."""
    layers = [evidence(common=4, top_k=4, experts=8, layers=4)] * 4
    for verdict, cause, reason in judge_all(layers):
        assert (verdict, cause) == ("stable", "pooled")
        assert "the 4 such layers together carry the test" in reason
        assert "with probability 4.2e-08" in reason


def test_a_layer_of_low_overlap_is_not_carried_by_the_others():
    layers = [evidence(common=common, top_k=4, experts=8, layers=4) for common in (4, 4, 4, 2)]
    judgements = judge_all(layers)
    assert [each.cause for each in judgements] == [*3 * ["pooled"], "too_few_experts"]
    assert judgements[3].verdict == NOISE
    assert "this one agrees on too few" in judgements[3].reason


def test_an_overlap_that_chance_has_on_average_is_not_carried_either():
    """Choices of 7 of 8 agree on at least 6, which is more than three quarters."""
    layers = [evidence(common=common, top_k=7, experts=8, layers=4) for common in (7, 7, 7, 6)]
    assert [each.cause for each in judge_all(layers)] == [*3 * ["pooled"], "too_few_experts"]


def test_layers_that_chance_explains_even_together_are_noise():
    layers = [evidence(common=common, top_k=4, experts=8, layers=4) for common in (3, 2, 2, 2)]
    for verdict, cause, reason in judge_all(layers):
        assert (verdict, cause) == (NOISE, "too_few_experts")
        assert "Nor can the 4 such layers together" in reason
        assert "above 0.05" in reason


def test_layers_without_a_choice_do_not_enter_the_test_of_all():
    layers = [evidence(common=common, top_k=4, experts=8, layers=4) for common in (4, 4, 4, 4)]
    nothing = [replace(layers[0], **{name: True}) for name in ("constant", "identical")]
    everything, short = replace(layers[0], top_k=8), replace(layers[0], stability=None)
    assert pooled_p_value([*layers[:2], *nothing, everything, short]) == pytest.approx(1 / 70**2)
    assert pooled_p_value([*nothing, everything, short]) is None
    assert judge_together(nothing) is None


def test_layers_that_can_tell_alone_take_their_part_of_the_level():
    """12 of 16 layers have their own test at 0.05 / 16 each; the other four share what is left."""
    alone = evidence(common=8, layers=16)
    together = judge_together([alone] * 12 + [evidence(common=15, top_k=15, experts=16, layers=16)] * 4)
    assert together == Together(layers=4, p_value=pytest.approx(1 / 16**4), level=pytest.approx(0.05 / 4))
    assert judge_together([alone] * 16) is None


def test_strong_layers_do_not_carry_a_weak_one():
    """One layer agrees on 15 of 16, as one in sixteen does by chance; the others leave nothing open."""
    judgements = judge_all([evidence(common=8)] * 5 + [evidence(common=15, top_k=15, experts=16)])
    assert [each.cause for each in judgements] == [*5 * ["agreement"], "too_few_experts"]


def test_few_experts_without_structure_pass_as_seldom_as_announced():
    """8 experts, 4 of them selected, 6 layers: in any of them with probability 0.05 at most."""
    random = np.random.default_rng(0).hypergeometric(4, 4, 4, size=(2000, 6))
    models = [[evidence(common=int(common), top_k=4, experts=8) for common in model] for model in random]
    called = [any(each.verdict != NOISE for each in judge_all(model)) for model in models]
    assert 0 < sum(called) <= stats.binom(2000, 0.05).ppf(0.99)


def test_a_share_below_its_null_is_no_more_concentrated_than_chance():
    verdict, _, reason = judge(evidence(common=8))
    assert verdict == "stable"
    assert "They hold 91.0 % of the score, no more concentrated than independent experts would be" in reason
    assert "95.0 %" in reason


def test_a_share_above_its_null_is_more_concentrated_than_chance():
    reason = judge(replace(evidence(), share=0.97, null_name="equal experts")).reason
    assert "They hold 97.0 % of the score, more concentrated than chance" in reason
    assert "the best 8 of equal experts hold 95.0 %" in reason


@pytest.mark.parametrize(
    ("changes", "why", "said"),
    [
        ({"constant": True}, "constant", "same probabilities"),
        ({"identical": True}, "identical", "any choice gives the same shared expert"),
        ({"top_k": 16}, "everything_selected", "Every one of the 16 experts to choose from is selected"),
        ({"stability": None, "half_tokens": (12, 0)}, "too_little_text", "the halves hold 12 and 0 tokens"),
    ],
)
def test_where_there_is_nothing_to_compare_perfect_agreement_is_noise(changes, why, said):
    verdict, cause, reason = judge(replace(evidence(common=8), **changes))
    assert (verdict, cause) == (NOISE, why)
    assert said in reason
    assert "of the score" not in reason


def test_what_is_wrong_with_the_model_is_said_before_what_is_wrong_with_the_text():
    assert "same weights" in judge(replace(evidence(), identical=True, stability=None)).reason
