"""The report of a selection says what to do, repeats no reason, stays short, and claims nothing it does not know."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from selection.report_text import judged, render_of, table
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
from nexus_ray.selection.figures.selection_figures import plot_selection
from nexus_ray.selection.record import NOISE
from nexus_ray.selection.report.advice import layer_numbers, next_steps
from nexus_ray.selection.report.report import write_report
from nexus_ray.selection.stability import Stability
from nexus_ray.stages import select_and_report


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
        select_and_report(None, layout)
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
