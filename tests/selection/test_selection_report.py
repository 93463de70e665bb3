"""The report of a selection says what to do, repeats no reason, stays short, and claims nothing it does not know."""

from __future__ import annotations

import re
from contextlib import nullcontext
from math import comb
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest
from selection.synthetic_selection import (
    SIZES,
    layer_selection,
    make_selection,
    sample,
    source_use,
    synthetic_selection,
    synthetic_statistics,
)

from nexus_ray.errors import StorageError
from nexus_ray.layout import RunLayout
from nexus_ray.router.artefact import RouterStatistics
from nexus_ray.router.moments import RouterMoments
from nexus_ray.selection.figures.selection_figures import plot_selection
from nexus_ray.selection.record import NOISE, LayerSelection, Selection
from nexus_ray.selection.report.advice import judgeable_count, layer_numbers, next_steps
from nexus_ray.selection.report.report import render, write_report
from nexus_ray.selection.report.sources import (
    Comparison,
    Pairwise,
    compare_sources,
    exclusive_experts,
    share_of_selections,
)
from nexus_ray.selection.stability import Stability
from nexus_ray.selection.verdict import Evidence, judge_all
from nexus_ray.stages import BY_NAME


def table(markdown: str, heading: str, number: int = 0) -> list[list[str]]:
    """Cells of a table below a heading, its own header included."""
    section = markdown.split(f"## {heading}\n")[1].split("\n## ")[0].strip()
    blocks = [block for block in section.split("\n\n") if block.startswith("|")]
    lines = [line for line in blocks[number].strip().splitlines() if not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def render_of(selection: Selection) -> str:
    """The report with statistics of the selection's shape."""
    return render(selection, synthetic_statistics(selection))


def judged(seed: int = 0, experts: int = 16, count: int = 8, **changes: object) -> LayerSelection:
    """A layer whose verdict and reason are the real ones for some evidence."""
    evidence = {"experts": experts, "top_k": count, "layers": 2, "constant": False, "identical": False}
    texts = {"half_tokens": (2000, 2000), "fewest_tokens": 17, "stability": Stability(0.5, 0.5, 0.5)}
    shares = {"share": 0.6, "null_share": 0.6, "null_share_high": 0.65, "null_name": "independent experts"}
    (judgement,) = judge_all([Evidence(**(evidence | texts | shares | changes))])
    return layer_selection(
        seed, experts, count, verdict=judgement.verdict, cause=judgement.cause, reason=judgement.reason
    )


@pytest.mark.parametrize(("layers", "experts", "count"), SIZES)
def test_every_size_stays_readable(layers: int, experts: int, count: int):
    markdown = render_of(synthetic_selection(layers, experts, count))
    rows = table(markdown, "Layers")
    assert [row[0] for row in rows[1:]] == [str(layer) for layer in range(layers)]
    assert all(len(row) == 6 for row in rows)
    listed = [row[1].split(" +")[0].split(", ") for row in rows[1:]]
    assert {len(experts) for experts in listed} == {min(count, 8)}
    assert all(row[1].endswith(" +16") == (count == 24) for row in rows[1:])
    assert max(map(len, markdown.splitlines())) < 700
    assert len(markdown.splitlines()) < 60 + 2 * layers


@pytest.mark.parametrize(("layers", "experts", "count"), SIZES)
def test_what_is_not_known_is_a_dash(layers: int, experts: int, count: int):
    unknown = {"split_half_overlap": None, "held_out_share": None, "overlap_p_value": None}
    usage = np.full(experts, 1 / experts)
    selection = synthetic_selection(
        layers, experts, count, **unknown, by_source={name: source_use(usage, count, None) for name in ("a", "b")}
    )
    markdown = render_of(selection)
    assert not re.search(r"\b(nan|None|inf)\b", markdown)
    assert table(markdown, "Layers")[1][3] == "-"
    assert table(markdown, "Layers")[1][4].startswith("- / ")
    assert table(markdown, "Which experts serve which text")[1][2:] == ["- (-, -)", "-", "-", "-", "**not known**"]
    assert "; -)" in table(markdown, "Which experts serve which text", 1)[1][1]


def test_the_summary_and_the_next_step_come_first():
    selection = synthetic_selection()
    blocks = render_of(selection).split("\n\n")
    assert blocks[:3] == ["# Expert selection", f"**{selection.summary()}**", next_steps(selection)[0]]


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


def test_layers_with_the_same_kind_of_reason_share_a_line_about_the_weakest():
    overlaps = [1.0, 0.75, 0.875, 0.875] * 9
    layers = [
        judged(
            seed,
            share=0.6 + seed / 1000,
            stability=Stability(overlap, 0.0001 if overlap < 1 else 7.8e-05, 0.6),
        ).model_copy(update={"split_half_overlap": overlap})
        for seed, overlap in enumerate(overlaps)
    ]
    markdown = render_of(make_selection(layers))
    bullets = [line for line in markdown.splitlines() if line.startswith("* ")]
    assert len(bullets) == 1
    assert bullets[0].startswith("* **stable**, layers 0-35. The weakest of them is layer ")
    weakest = int(re.search(r"weakest of them is layer (\d+)", bullets[0]).group(1))
    assert overlaps[weakest] == 0.75
    assert bullets[0].endswith(layers[weakest].reason)


def test_each_kind_of_reason_has_its_line_the_best_verdict_first():
    same = judged(identical=True)
    markdown = render_of(make_selection([same, judged(), same, layer_selection(0, 16, 8)]))
    bullets = [line for line in markdown.splitlines() if line.startswith("* ")]
    assert [bullet.split(",")[0] for bullet in bullets] == ["* **stable**"] + [f"* **{NOISE}**"] * 2
    assert bullets[1] == f"* **{NOISE}**, layers 0, 2: {same.reason}"


def test_passed_over_experts_have_a_column_only_where_there_are_any():
    assert "passed over" not in table(render_of(synthetic_selection(1)), "Layers")[0]
    layers = [layer_selection(0, 16, 4, passed_over=(3, 9)), layer_selection(1, 16, 4)]
    rows = table(render_of(make_selection(layers, max_correlation=0.9)), "Layers")
    assert [row[-1] for row in rows] == ["passed over", "3, 9", "-"]


def test_shares_overlaps_and_their_chance_stand_side_by_side():
    layer = layer_selection(
        0, 16, 4, share=0.77, null_share=0.61, null_share_high=0.66, held_out_share=0.72, split_half_overlap=0.75
    )
    row = table(render_of(make_selection([layer])), "Layers")[1]
    assert row[2:] == ["77 % / 61 % (66 %)", "72 %", "75 % / 25 %", "stable"]


def uses(**experts: list[int]) -> LayerSelection:
    """A layer of 8 experts in which each source is sent to three of its own in three of four cases."""
    by_source = {}
    for name, chosen in experts.items():
        usage = np.full(8, 0.05)
        usage[chosen] = [0.3, 0.25, 0.2]
        by_source[name] = source_use(usage, 3, 1.0)
    return layer_selection(0, 8, 3, by_source=by_source)


def test_experts_in_the_list_of_one_text_only_are_bold_where_the_texts_differ():
    layer = uses(play=[0, 1, 2], code=[0, 4, 1])
    assert exclusive_experts(layer) == {2, 4}
    selection = make_selection([layer] * 5)
    apart, alike = (
        statistics_of_use(selection, {"play": [play, play], "code": [code, code]})
        for play, code in (([9, 3, 0, 0], [0, 0, 3, 9]), ([9, 3, 0, 0], [9, 3, 0, 0]))
    )
    row = table(render(selection, apart), "Which experts serve which text", 1)[1]
    assert row[1:] == ["0, 1, **2** (75 %; 100 %)", "0, **4**, 1 (75 %; 100 %)"]
    row = table(render(selection, alike), "Which experts serve which text", 1)[1]
    assert row[1:] == ["0, 1, 2 (75 %; 100 %)", "0, 4, 1 (75 %; 100 %)"]


def test_one_source_has_no_experts_of_its_own_to_mark():
    layer = uses(play=[0, 1, 2])
    assert exclusive_experts(layer) == set()
    markdown = render_of(make_selection([layer]))
    assert "Only one source was collected" in markdown
    assert "Bold" not in markdown


def test_the_share_of_a_list_is_the_sum_of_its_usage():
    layer = layer_selection(3, 16, 5)
    for name, use in layer.by_source.items():
        assert share_of_selections(layer, name) == pytest.approx(np.sort(use.usage)[::-1][:5].sum())


def statistics_of_use(selection: Selection, selected: dict[str, list[list[int]]]) -> RouterStatistics:
    """Statistics in which every layer has these selection counts of the first experts, by source and half."""
    experts, layers = selection.num_experts, len(selection.layers)
    diagonal = np.flatnonzero(np.equal(*np.triu_indices(experts)))
    sources = {}
    for name, halves in selected.items():
        moments = RouterMoments.empty(layers, experts)
        for half, counts in enumerate(halves):
            moments.selected_together[half][:, diagonal[: len(counts)]] = counts
        sources[name] = moments
    return RouterStatistics(synthetic_statistics(selection).description, sources)


def test_the_distance_of_texts_is_the_part_of_the_selections_that_goes_to_other_experts():
    selection = synthetic_selection(1, 8, 3, sources=("play", "code"))
    statistics = statistics_of_use(selection, {"play": [[6, 2, 0], [2, 6, 0]], "code": [[0, 4, 4], [0, 3, 5]]})
    (pair,) = compare_sources(selection, statistics)
    assert pair.distance.between[0] == pytest.approx(9 / 16), "play 8 8 0, code 0 7 9, of 16 each"
    assert pair.distance.first[0] == pytest.approx(4 / 8)
    assert pair.distance.second[0] == pytest.approx(1 / 8)
    assert pair.apart_layers == 0, "farther than the halves of either, but not twice as far"


def test_texts_differ_where_they_are_apart_in_more_layers_than_luck_gives():
    far, near = Pairwise(*np.array([[0.3], [0.1], [0.15]])), Pairwise(*np.array([[0.29], [0.1], [0.15]]))

    def compared(apart: int, not_apart: int) -> Comparison:
        parts = [far] * apart + [near] * not_apart
        rows = [np.concatenate([getattr(part, name) for part in parts]) for name in ("between", "first", "second")]
        return Comparison(("a", "b"), Pairwise(*rows), Pairwise(*rows))

    for apart, not_apart in ((5, 0), (4, 1), (7, 1), (6, 2), (17, 7), (16, 8), (0, 6)):
        pair = compared(apart, not_apart)
        expected = binomtest(apart, apart + not_apart, alternative="greater").pvalue
        assert pair.p_value == pytest.approx(expected)
        assert pair.conclusion == ("yes" if expected <= 0.05 else "not shown")
        assert pair.luck_layers == (apart + not_apart) / 2
    assert compared(4, 0).conclusion == compared(0, 4).conclusion == "too few layers"


def test_layers_that_say_nothing_are_left_out_of_the_comparison():
    usage, counts = np.full(16, 1 / 16), {"play": [[9, 0], [9, 0]], "code": [[0, 9], [0, 9]]}
    unknown = {name: source_use(usage, 4, None) for name in counts}
    layers = [layer_selection(seed, 16, 4, ("play", "code")) for seed in range(6)]
    layers += [layer_selection(6, 16, 4, ("play", "code"), cause=cause) for cause in ("identical", "constant")]
    layers += [layer_selection(8, 16, 4, by_source=unknown)]
    (pair,) = compare_sources(make_selection(layers), statistics_of_use(make_selection(layers), counts))
    assert (pair.apart_layers, pair.known_layers, pair.conclusion) == (6, 6, "yes")
    nothing = make_selection(layers[6:])
    (pair,) = compare_sources(nothing, statistics_of_use(nothing, counts))
    assert pair.conclusion == "not known"


def pairs_called_different(sources: int, layers: int, tokens: tuple[int, ...], seed: int, topics: int) -> list[bool]:
    """Whether pairs of texts of one kind are called different: popularity is real, documents have topics."""
    generator = np.random.default_rng(seed)
    popularity = generator.normal(0, 1, (layers, 16))
    taste = generator.normal(0, 1, (layers, 16, topics)) / np.sqrt(topics)
    selected = {}
    for name in range(sources):
        documents = generator.normal(0, 1, (2, tokens[name % len(tokens)] // 100, topics))
        logits = popularity + 0.5 * np.einsum("let,hdt->hdle", taste, documents)
        shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        selected[str(name)] = generator.multinomial(100, shares).sum(axis=1)
    selection = make_selection([layer_selection(0, 16, 4, tuple(selected))] * layers)
    statistics = statistics_of_use(selection, {name: [[0]] * 2 for name in selected})
    diagonal = np.flatnonzero(np.equal(*np.triu_indices(16)))
    for name, counts in selected.items():
        statistics.sources[name].selected_together[:, :, diagonal] = counts
    return [pair.conclusion == "yes" for pair in compare_sources(selection, statistics)]


@pytest.mark.parametrize("layers", [6, 24])
@pytest.mark.parametrize("tokens", [(2000,), (4000, 500)])
def test_texts_of_one_kind_are_called_different_in_at_most_5_of_100_pairs(layers: int, tokens: tuple[int, ...]):
    found = [pairs_called_different(3, layers, tokens, seed, topics=3) for seed in range(100)]
    assert np.mean(found) <= 0.05


def test_texts_are_compared_in_numbers_with_chance_beside_them():
    layers = [layer_selection(seed, 16, 4, ("play", "code")) for seed in range(6)]
    selection = make_selection(layers)
    counts = {"play": [[6, 4, 0], [5, 5, 0]], "code": [[0, 4, 6], [0, 4, 6]]}
    markdown = render(selection, statistics_of_use(selection, counts))
    row = table(markdown, "Which experts serve which text")[1]
    shared = [
        len(set(layer.by_source["play"].selected) & set(layer.by_source["code"].selected)) / 4 for layer in layers
    ]
    overlaps = f"{100 * np.mean(shared):.0f} % (90 %, 90 %)"
    assert row == ["play, code", overlaps, "60 % (10 %, 0 %)", "6 of 6", "at most 3", "0.016", "**yes**"]
    assert "random lists have 25 %" in markdown


def test_every_pair_of_sources_is_compared_the_chosen_ones_first():
    selection = make_selection([layer_selection(0, 16, 4)], sources=("code",))
    pairs = [pair.names for pair in compare_sources(selection, synthetic_statistics(selection))]
    assert pairs == [("code", "play"), ("code", "prose"), ("play", "prose")]


def test_calibration_is_compared_with_random_choice_and_with_the_reference():
    calibration = {"play": sample(4096), "prose": sample(8192, random_coverage=0.0, method="random")}
    markdown = render_of(make_selection([layer_selection(0, 16, 4)], calibration=calibration))
    rows = table(markdown, "Calibration text")[1:]
    assert rows[0] == ["play", "coverage", "800", "16", "4,096", "3,500", "1.050", "1.200"]
    assert rows[1] == ["prose", "random", "800", "32", "8,192", "3,500", "-", "1.200"]
    assert rows[2] == ["code", "not recorded", "-", "-", "12,288", "-", "-", "-"]


def test_rare_tokens_are_mentioned_only_for_text_chosen_for_coverage():
    layers = [layer_selection(0, 16, 4)]
    randomly = {"play": sample(4096, method="random")}
    assert "over-represent rare tokens" in render_of(make_selection(layers))
    assert "rare tokens" not in render_of(make_selection(layers, calibration=randomly))


def test_the_distribution_stands_beside_the_null_and_equal_experts():
    selection = synthetic_selection(3, 16, 4)
    rows = table(render_of(selection), "Distribution of the score")
    assert [row[0] for row in rows[1:]] == ["best 4", "best 8"]
    measured = np.mean([layer.distribution.top_fractions["4"] for layer in selection.layers])
    null = np.mean([layer.null_curve[3] for layer in selection.layers])
    assert rows[1][1:] == [f"{100 * measured:.0f} %", f"{100 * null:.0f} %", "25 %"]
    labels = {layer.distribution.pattern for layer in selection.layers}
    assert all(f"{label} in " in render_of(selection) for label in labels)


@pytest.mark.parametrize(
    ("method", "words"),
    [("pca", "independently of each other"), ("usage", "all equally good"), ("reap", "all equally good")],
)
def test_the_null_model_is_that_of_the_method(method: str, words: str):
    assert words in render_of(make_selection([layer_selection(0, 8, 2)], method=method))


def test_where_all_experts_hold_the_same_weights_there_are_no_figures_of_the_choice():
    copies = judged(identical=True)
    row = table(render_of(make_selection([copies, layer_selection(1, 16, 8)])), "Layers")[1]
    assert row[2:] == ["-", "-", "-", NOISE]
    markdown = render_of(make_selection([copies] * 2))
    assert "how the score is spread over them means nothing" in markdown
    assert "best 4" not in markdown


def test_stability_is_promised_for_text_chosen_as_here_only():
    layers = [layer_selection(0, 16, 4)]
    randomly = {"play": sample(4096, method="random")}
    assert "repeats on other text of this kind, chosen for coverage as here." in render_of(make_selection(layers))
    assert "repeats on other text of this kind. " in render_of(make_selection(layers, calibration=randomly))


def test_halves_are_said_to_share_at_most_one_document():
    assert "have at most one document in common" in render_of(synthetic_selection())


def test_stability_is_not_sold_as_a_benefit():
    assert "It does not mean that training from it is better" in render_of(synthetic_selection())


def test_figures_that_exist_are_embedded_by_relative_path(tmp_path: Path):
    layout = RunLayout(tmp_path / "a run")
    selection = synthetic_selection(2, 8, 3)
    statistics = synthetic_statistics(selection)
    paths = plot_selection(selection, statistics, layout.plots)
    write_report(selection, statistics, layout.selection_report, layout.plots)
    assert layout.selection_report == tmp_path / "a run" / "selection.md"
    embedded = re.findall(r"!\[[^]]+]\(([^)]+)\)", layout.selection_report.read_text())
    assert sorted(embedded) == sorted(f"plots/{path.name}" for path in paths)
    assert sorted(path.name for path in layout.directory.iterdir()) == ["plots", "selection.md"]
    (layout.plots / "co_selection.png").unlink()
    write_report(selection, statistics, layout.selection_report, layout.plots)
    assert "co_selection.png" not in layout.selection_report.read_text()
    assert "concentration.png" in layout.selection_report.read_text()


@pytest.mark.parametrize("fails", [True, False])
def test_a_figure_that_cannot_be_drawn_does_not_cost_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
):
    made = synthetic_selection(2, 8, 3)
    layout = RunLayout(tmp_path)
    synthetic_statistics(made).save(layout.router_stats)

    def refuse(*_: object) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr("nexus_ray.selection.selection.select", lambda *_: made)
    if fails:
        monkeypatch.setattr("nexus_ray.selection.figures.selection_figures.plot_selection", refuse)
    with pytest.raises(StorageError) if fails else nullcontext():
        BY_NAME["select"].run(SimpleNamespace(config=None, layout=layout), "recipe")
    assert layout.selection_report.read_text().startswith("# Expert selection")
    assert ("![" in layout.selection_report.read_text()) != fails


def test_figures_elsewhere_are_found_and_spaces_survive(tmp_path: Path):
    plots = tmp_path / "some plots"
    selection = synthetic_selection(1, 4, 2)
    plot_selection(selection, None, plots)
    write_report(selection, synthetic_statistics(selection), tmp_path / "deep" / "selection.md", plots)
    text = (tmp_path / "deep" / "selection.md").read_text()
    assert "](../some%20plots/concentration.png)" in text


def test_without_figures_the_report_is_all_text():
    assert "![" not in render_of(synthetic_selection())


def test_a_bar_in_the_name_of_a_source_does_not_break_the_tables():
    markdown = render_of(make_selection([layer_selection(0, 8, 2, ("a|b", "c"))]))
    header = [line for line in markdown.splitlines() if line.startswith("| layer | a")]
    assert header == ["| layer | a\\|b | c |"]


def test_runs_of_layers_are_shortened():
    assert layer_numbers([3]) == "layer 3"
    assert layer_numbers([0, 1, 2, 5, 7, 8]) == "layers 0-2, 5, 7-8"
