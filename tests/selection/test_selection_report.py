"""The report of a selection says what to do, repeats no reason, stays short, and claims nothing it does not know."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from selection.synthetic_selection import (
    SIZES,
    layer_selection,
    make_selection,
    sample,
    source_use,
    synthetic_selection,
    synthetic_statistics,
)

from nexus_ray.layout import RunLayout
from nexus_ray.selection.advice import layer_numbers, next_steps
from nexus_ray.selection.plots import plot_selection
from nexus_ray.selection.record import NOISE, LayerSelection
from nexus_ray.selection.report import render, write_report
from nexus_ray.selection.serving import compare_sources, exclusive_experts, share_of_selections
from nexus_ray.selection.stability import Stability
from nexus_ray.selection.verdict import Evidence, judge


def table(markdown: str, heading: str, number: int = 0) -> list[list[str]]:
    """Cells of a table below a heading, its own header included."""
    section = markdown.split(f"## {heading}\n")[1].split("\n## ")[0].strip()
    blocks = [block for block in section.split("\n\n") if block.startswith("|")]
    lines = [line for line in blocks[number].strip().splitlines() if not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def judged(seed: int = 0, experts: int = 16, count: int = 8, **changes: object) -> LayerSelection:
    """A layer whose verdict and reason are the real ones for some evidence."""
    evidence = {"experts": experts, "top_k": count, "layers": 2, "constant": False, "identical": False}
    texts = {"half_tokens": (2000, 2000), "fewest_tokens": 17, "stability": Stability(0.5, 0.5, 0.5)}
    shares = {"share": 0.6, "null_share": 0.6, "null_share_high": 0.65, "null_name": "independent experts"}
    verdict, reason = judge(Evidence(**(evidence | texts | shares | changes)))
    return layer_selection(seed, experts, count, verdict=verdict, reason=reason)


@pytest.mark.parametrize(("layers", "experts", "count"), SIZES)
def test_every_size_stays_readable(layers: int, experts: int, count: int):
    markdown = render(synthetic_selection(layers, experts, count))
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
    markdown = render(selection)
    assert not re.search(r"\b(nan|None|inf)\b", markdown)
    assert table(markdown, "Layers")[1][3] == "-"
    assert table(markdown, "Layers")[1][4].startswith("- / ")
    assert table(markdown, "Which experts serve which text")[1][2:] == ["-", "-", "-", "**not known**"]
    assert "; -)" in table(markdown, "Which experts serve which text", 1)[1][1]


def test_the_summary_and_the_next_step_come_first():
    selection = synthetic_selection()
    blocks = render(selection).split("\n\n")
    assert blocks[:3] == ["# Expert selection", f"**{selection.summary()}**", next_steps(selection)[0]]


def test_a_stable_choice_can_be_used():
    (advice,) = next_steps(synthetic_selection(share=0.9, null_share_high=0.5))
    assert "repeats in every layer" in advice
    assert "convert.initialisation=pca_topK" in advice


def test_a_stable_choice_whose_share_chance_would_give_comes_with_a_warning():
    warned = next_steps(synthetic_selection(share=0.5, null_share_high=0.9))
    assert "independent experts would hold as much in every layer" in warned[1]
    one_above = [layer_selection(0, 8, 2, share=0.9, null_share_high=0.8), layer_selection(1, 8, 2, share=0.1)]
    assert len(next_steps(make_selection(one_above))) == 1


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
        ({"experts": 4, "count": 1, "top_k": 1}, "`select.top_k=2` is the easiest to judge"),
        ({"experts": 2, "count": 1, "top_k": 1}, "whatever the text"),
    ],
)
def test_where_no_text_would_help_none_is_asked_for(evidence: dict[str, object], words: str):
    layer = judged(**evidence)
    assert layer.verdict == NOISE
    advice = " ".join(next_steps(make_selection([layer])))
    assert words in advice
    assert "collect.tokens" not in advice


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
    markdown = render(make_selection(layers))
    bullets = [line for line in markdown.splitlines() if line.startswith("* ")]
    assert len(bullets) == 1
    assert bullets[0].startswith("* **stable**, layers 0-35. The weakest of them is layer ")
    weakest = int(re.search(r"weakest of them is layer (\d+)", bullets[0]).group(1))
    assert overlaps[weakest] == 0.75
    assert bullets[0].endswith(layers[weakest].reason)


def test_each_kind_of_reason_has_its_line_the_best_verdict_first():
    same = judged(identical=True)
    markdown = render(make_selection([same, judged(), same, layer_selection(0, 16, 8)]))
    bullets = [line for line in markdown.splitlines() if line.startswith("* ")]
    assert [bullet.split(",")[0] for bullet in bullets] == ["* **stable**"] + [f"* **{NOISE}**"] * 2
    assert bullets[1] == f"* **{NOISE}**, layers 0, 2: {same.reason}"


def test_passed_over_experts_have_a_column_only_where_there_are_any():
    assert "passed over" not in table(render(synthetic_selection(1)), "Layers")[0]
    layers = [layer_selection(0, 16, 4, passed_over=(3, 9)), layer_selection(1, 16, 4)]
    rows = table(render(make_selection(layers, max_correlation=0.9)), "Layers")
    assert [row[-1] for row in rows] == ["passed over", "3, 9", "-"]


def test_shares_overlaps_and_their_chance_stand_side_by_side():
    layer = layer_selection(
        0, 16, 4, share=0.77, null_share=0.61, null_share_high=0.66, held_out_share=0.72, split_half_overlap=0.75
    )
    row = table(render(make_selection([layer])), "Layers")[1]
    assert row[2:] == ["77 % / 61 % (66 %)", "72 %", "75 % / 25 %", "stable"]


def uses(**experts: list[int]) -> LayerSelection:
    """A layer of 8 experts in which each source is sent to three of its own in three of four cases."""
    by_source = {}
    for name, chosen in experts.items():
        usage = np.full(8, 0.05)
        usage[chosen] = [0.3, 0.25, 0.2]
        by_source[name] = source_use(usage, 3, 1.0)
    return layer_selection(0, 8, 3, by_source=by_source)


def test_experts_in_the_list_of_one_text_only_are_bold():
    layer = uses(play=[0, 1, 2], code=[0, 4, 1])
    assert exclusive_experts(layer) == {2, 4}
    row = table(render(make_selection([layer])), "Which experts serve which text", 1)[1]
    assert row[1:] == ["0, 1, **2** (75 %; 100 %)", "0, **4**, 1 (75 %; 100 %)"]


def test_one_source_has_no_experts_of_its_own_to_mark():
    layer = uses(play=[0, 1, 2])
    assert exclusive_experts(layer) == set()
    markdown = render(make_selection([layer]))
    assert "Only one source was collected" in markdown
    assert "Bold" not in markdown


def test_the_share_of_a_list_is_the_sum_of_its_usage():
    layer = layer_selection(3, 16, 5)
    for name, use in layer.by_source.items():
        assert share_of_selections(layer, name) == pytest.approx(np.sort(use.usage)[::-1][:5].sum())


def with_lists(play: list[int], code: list[int], within: tuple[float | None, float | None]) -> LayerSelection:
    usage = np.full(16, 1 / 16)
    pairs = zip(("play", "code"), (play, code), within, strict=True)
    by_source = {
        name: source_use(usage, 4, overlap).model_copy(update={"selected": tuple(chosen)})
        for name, chosen, overlap in pairs
    }
    return layer_selection(0, 16, 4, by_source=by_source)


def test_texts_have_experts_of_their_own_only_beyond_what_halves_of_one_text_differ_by():
    apart, alike = [4, 5, 0, 1], [0, 1, 2, 4]
    clear = with_lists([0, 1, 2, 3], apart, (0.75, 1.0))
    unclear = with_lists([0, 1, 2, 3], alike, (0.75, 1.0))
    (comparison,) = compare_sources(make_selection([clear, unclear]))
    assert comparison.between.tolist() == [0.5, 0.75]
    assert (comparison.apart_layers, comparison.known_layers) == (1, 2)
    conclusions = [
        compare_sources(make_selection(layers))[0].conclusion()
        for layers in ([clear] * 4 + [unclear], [clear, unclear], [unclear] * 3)
    ]
    assert conclusions == ["yes", "in some layers", "no"]


def test_identical_lists_and_unknown_halves_prove_nothing():
    same = with_lists([0, 1, 2, 3], [3, 2, 1, 0], (1.0, 1.0))
    assert compare_sources(make_selection([same]))[0].conclusion() == "no"
    unknown = with_lists([0, 1, 2, 3], [4, 5, 6, 7], (None, 1.0))
    assert compare_sources(make_selection([unknown]))[0].conclusion() == "not known"
    (comparison,) = compare_sources(make_selection([unknown, with_lists([0, 1, 2, 3], [4, 5, 6, 7], (1.0, 1.0))]))
    assert (comparison.apart_layers, comparison.known_layers) == (1, 1)


def test_texts_are_compared_in_numbers_with_chance_beside_them():
    layers = [with_lists([0, 1, 2, 3], [4, 5, 0, 1], (0.75, 1.0)), with_lists([0, 1, 2, 3], [4, 5, 6, 7], (1.0, 1.0))]
    markdown = render(make_selection(layers))
    row = table(markdown, "Which experts serve which text")[1]
    assert row == ["play, code", "25 %", "88 %", "100 %", "2 of 2", "**yes**"]
    assert "Random lists have 25 % in common" in markdown


def test_every_pair_of_sources_is_compared_the_chosen_ones_first():
    selection = make_selection([layer_selection(0, 16, 4)], sources=("code",))
    pairs = [(pair.first, pair.second) for pair in compare_sources(selection)]
    assert pairs == [("code", "play"), ("code", "prose"), ("play", "prose")]


def test_calibration_is_compared_with_random_choice_and_with_the_reference():
    calibration = {"play": sample(4096), "prose": sample(8192, random_coverage=0.0, method="random")}
    markdown = render(make_selection([layer_selection(0, 16, 4)], calibration=calibration))
    rows = table(markdown, "Calibration text")[1:]
    assert rows[0] == ["play", "coverage", "800", "16", "4,096", "3,500", "1.050", "1.200"]
    assert rows[1] == ["prose", "random", "800", "32", "8,192", "3,500", "-", "1.200"]
    assert rows[2] == ["code", "not recorded", "-", "-", "12,288", "-", "-", "-"]


def test_rare_tokens_are_mentioned_only_for_text_chosen_for_coverage():
    layers = [layer_selection(0, 16, 4)]
    randomly = {"play": sample(4096, method="random")}
    assert "over-represent rare tokens" in render(make_selection(layers))
    assert "rare tokens" not in render(make_selection(layers, calibration=randomly))


def test_the_distribution_stands_beside_the_null_and_equal_experts():
    selection = synthetic_selection(3, 16, 4)
    rows = table(render(selection), "Distribution of the score")
    assert [row[0] for row in rows[1:]] == ["best 4", "best 8"]
    measured = np.mean([layer.distribution.top_fractions["4"] for layer in selection.layers])
    null = np.mean([layer.null_curve[3] for layer in selection.layers])
    assert rows[1][1:] == [f"{100 * measured:.0f} %", f"{100 * null:.0f} %", "25 %"]
    labels = {layer.distribution.pattern for layer in selection.layers}
    assert all(f"{label} in " in render(selection) for label in labels)


@pytest.mark.parametrize(
    ("method", "words"),
    [("pca", "independently of each other"), ("usage", "all equally good"), ("reap", "all equally good")],
)
def test_the_null_model_is_that_of_the_method(method: str, words: str):
    assert words in render(make_selection([layer_selection(0, 8, 2)], method=method))


def test_stability_is_not_sold_as_a_benefit():
    assert "It does not mean that training from it is better" in render(synthetic_selection())


def test_figures_that_exist_are_embedded_by_relative_path(tmp_path: Path):
    layout = RunLayout(tmp_path / "a run")
    selection = synthetic_selection(2, 8, 3)
    paths = plot_selection(selection, synthetic_statistics(selection), layout.plots)
    write_report(selection, layout.selection_report, layout.plots)
    assert layout.selection_report == tmp_path / "a run" / "selection.md"
    embedded = re.findall(r"!\[[^]]+]\(([^)]+)\)", layout.selection_report.read_text())
    assert sorted(embedded) == sorted(f"plots/{path.name}" for path in paths)
    assert sorted(path.name for path in layout.directory.iterdir()) == ["plots", "selection.md"]
    (layout.plots / "co_selection.png").unlink()
    write_report(selection, layout.selection_report, layout.plots)
    assert "co_selection.png" not in layout.selection_report.read_text()
    assert "concentration.png" in layout.selection_report.read_text()


def test_figures_elsewhere_are_found_and_spaces_survive(tmp_path: Path):
    plots = tmp_path / "some plots"
    plot_selection(synthetic_selection(1, 4, 2), None, plots)
    write_report(synthetic_selection(1, 4, 2), tmp_path / "deep" / "selection.md", plots)
    text = (tmp_path / "deep" / "selection.md").read_text()
    assert "](../some%20plots/concentration.png)" in text


def test_without_figures_the_report_is_all_text():
    assert "![" not in render(synthetic_selection())


def test_a_bar_in_the_name_of_a_source_does_not_break_the_tables():
    markdown = render(make_selection([layer_selection(0, 8, 2, ("a|b", "c"))]))
    header = [line for line in markdown.splitlines() if line.startswith("| layer | a")]
    assert header == ["| layer | a\\|b | c |"]


def test_runs_of_layers_are_shortened():
    assert layer_numbers([3]) == "layer 3"
    assert layer_numbers([0, 1, 2, 5, 7, 8]) == "layers 0-2, 5, 7-8"
