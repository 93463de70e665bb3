"""What a report advises: by the cause of each verdict, only what can be followed, and no more than was shown."""

from __future__ import annotations

from math import comb

import pytest
from selection.report_text import judged
from selection.synthetic_selection import (
    layer_selection,
    make_selection,
    synthetic_selection,
)

from nexus_ray.selection.record import NOISE, Selection
from nexus_ray.selection.report.advice import judgeable_count, next_steps
from nexus_ray.selection.stability import Stability


def test_a_stable_choice_can_be_used():
    (advice,) = next_steps(synthetic_selection(share=0.9, null_share_high=0.5))
    assert "repeats in every layer" in advice
    assert "convert.initialisation=pca_topK" in advice


def test_a_stable_choice_whose_share_chance_would_give_comes_with_a_warning():
    warned = next_steps(synthetic_selection(share=0.5, null_share_high=0.9))
    assert "independent experts would hold in 0 of the 6 layers judged (layers 0-5); luck alone gives 0.3" in warned[1]


@pytest.mark.parametrize(("above", "warns"), [(0, True), (2, True), (4, True), (5, False)])
def test_a_few_layers_above_the_null_by_luck_do_not_silence_the_warning(above: int, warns: bool):
    """Of 30 structureless layers 2 are above with probability 0.45, 4 with 0.06, 5 with 0.02."""
    layers = [
        layer_selection(seed, 8, 2, share=0.9 if seed < above else 0.1, null_share_high=0.8) for seed in range(30)
    ]
    advice = " ".join(next_steps(make_selection(layers)))
    assert ("no evidence" in advice) == warns
    if warns:
        assert f"in {above} of the 30 layers judged (layers 0-29); luck alone gives 1.5" in advice


def test_layers_that_were_not_judged_do_not_count_for_or_against_the_share():
    copies = judged(identical=True)
    layers = [layer_selection(0, 16, 8, share=0.1, null_share_high=0.8), copies, layer_selection(2, 16, 8, share=0.1)]
    advice = " ".join(next_steps(make_selection(layers)))
    assert "in 0 of the 2 layers judged (layers 0, 2)" in advice


def test_noise_everywhere_is_not_to_be_trusted_and_asks_for_more_text():
    advice = next_steps(make_selection([judged(0), judged(1)]))
    assert "Do not trust this choice" in advice[0]
    assert "convert.initialisation=top1_zero" in advice[0]
    assert "`zero`" in advice[0]
    read = sum(4096 * factor for factor in (1, 2, 3))
    assert f"raise `collect.tokens` ({read:,} tokens were read) to {2 * read:,}" in advice[1]
    assert "every layer" in advice[1]


def test_layers_that_are_open_are_named():
    stable = layer_selection(0, 16, 8, share=0.9, null_share_high=0.5)
    advice = next_steps(make_selection([stable, judged(), stable, judged(), judged()]))
    assert "only in 2 of 5 layers; it is open in layers 1, 3-4." in advice[0]
    assert "More text may settle layers 1, 3-4" in advice[1]
    partly = make_selection([layer_selection(0, 8, 2, verdict="partly stable", share=0.9)] * 2)
    assert "in no layer without care" in next_steps(partly)[0]


def test_identical_experts_need_no_text_because_any_choice_gives_the_same():
    advice = " ".join(next_steps(make_selection([judged(identical=True)] * 2)))
    assert "the choice does not matter" in advice
    assert "any choice gives the same shared expert" in advice
    assert "collect.tokens" not in advice


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        ({"constant": True}, "every token the same probabilities"),
        ({"count": 16, "top_k": 16}, "lower `select.top_k`"),
        ({"experts": 4, "count": 1, "top_k": 1, "layers": 1}, "No other number of experts would change that"),
        ({"experts": 2, "count": 1, "top_k": 1, "layers": 1}, "whatever the text"),
    ],
)
def test_where_no_text_would_help_none_is_asked_for(evidence: dict[str, object], words: str):
    layer = judged(**evidence)
    assert layer.verdict == NOISE
    advice = " ".join(next_steps(make_selection([layer])))
    assert words in advice
    assert "collect.tokens" not in advice


def test_a_choice_that_no_agreement_could_have_confirmed_is_not_called_untrustworthy():
    for evidence in ({"experts": 4, "count": 1, "top_k": 1, "layers": 1}, {"count": 16, "top_k": 16}):
        advice = next_steps(make_selection([judged(**evidence)]))
        assert "Do not trust" not in advice[0]
        assert "not known" in advice[0]
        assert "convert.initialisation=top1_zero" in advice[0]


def few_experts(count: int, layers: int, experts: int, **changes: object) -> Selection:
    """Layers in which even full agreement would not pass, and in which the halves agree on half of the experts."""
    evidence = {"layers": layers, "top_k": count, "stability": Stability(0.5, 0.5, 0.5)}
    rows = [judged(seed, experts, count, **evidence) for seed in range(layers)]
    assert {row.cause for row in rows} == {"too_few_experts"}
    return make_selection(rows, **{"pooled_overlap_p_value": 0.5} | changes)


def test_layers_that_only_all_together_could_pass_and_do_not_are_not_to_be_trusted():
    advice = " ".join(next_steps(few_experts(4, 4, 8)))
    assert "Do not trust the choice of any one layer: not even all layers together can be told from chance" in advice
    assert "collect.tokens" in advice
    together = next_steps(few_experts(4, 4, 8, pooled_overlap_p_value=0.003))[0]
    assert "the halves agree on more experts than by luck (probability 0.003), but nowhere on enough" in together


@pytest.mark.parametrize("experts", [4, 6, 8, 10, 16, 32, 128])
@pytest.mark.parametrize("layers", [1, 4, 24, 36])
def test_a_number_of_experts_is_advised_only_where_full_agreement_would_pass(experts: int, layers: int):
    passing = [count for count in range(1, experts) if 1 / comb(experts, count) <= 0.05 / layers]
    for selected in (1, experts // 2, experts - 1):
        layer = layer_selection(0, experts, selected)
        nearest = min(passing, key=lambda count: (abs(count - selected), count), default=None)
        assert judgeable_count([layer], layers) == nearest


def test_the_advised_number_counts_only_experts_that_are_not_passed_over():
    layer = layer_selection(0, 16, 1, passed_over=tuple(range(8)))
    assert judgeable_count([layer], 1) == 2
    assert judgeable_count([layer], 2) == 3
    assert judgeable_count([layer], 3) == 4
    assert judgeable_count([layer], 4) is None


def test_too_many_of_many_experts_is_not_blamed_on_their_number():
    advice = " ".join(next_steps(few_experts(15, 4, 16)))
    assert "With 15 of 16 experts selected, no agreement in every layer could be told from luck by itself" in advice
    assert "Full agreement would be evidence with `select.top_k=14`." in advice


def test_no_number_is_advised_where_none_would_pass():
    advice = " ".join(next_steps(few_experts(4, 4, 8)))
    assert "select.top_k" not in advice
    assert "No other number of experts would change that" in advice


def test_advice_names_the_setting_that_decides_how_many_are_selected():
    advice = " ".join(next_steps(few_experts(15, 4, 16, coverage=0.99)))
    assert "`select.coverage=null` and `select.top_k=14`" in advice
    everything = [judged(count=16, top_k=16)]
    assert "lower `select.coverage` to" in " ".join(next_steps(make_selection(everything, coverage=0.99)))
    assert "select.coverage" not in " ".join(next_steps(make_selection(everything)))


def test_too_little_text_asks_for_more():
    advice = next_steps(make_selection([judged(stability=None)]))
    assert "collect.tokens" in advice[1]
