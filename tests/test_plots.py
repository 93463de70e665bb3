"""Figures are written, hold what they should, and change with their data."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation.synthetic import evaluation, source_result, training_records
from matplotlib.figure import Figure

from nexus_ray import plot_style, plots
from nexus_ray.errors import ConfigError
from nexus_ray.plots.records import smooth

BETTER = evaluation((1126.0, 106.0, (0.092, 0.097)), (51.0, 51.1, (0.995, 1.009)))
DRAWINGS: dict[str, Callable[[Path], None]] = {
    "training": lambda path: plots.plot_training(training_records(), path),
    "drift": lambda path: plots.plot_drift(BETTER, path),
    "perplexity": lambda path: plots.plot_perplexity(BETTER, path),
    "compare": lambda path: plots.compare_runs({"a": training_records(30), "b": training_records(20)}, path),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would be saved during the test: laying them out takes long, so they are not."""
    figures: list[Figure] = []
    monkeypatch.setattr(plot_style, "save", lambda figure, path: figures.append(figure))
    return figures


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved during the test."""
    figures: list[Figure] = []
    save = plot_style.save

    def spy(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plot_style, "save", spy)
    return figures


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


@pytest.mark.parametrize("kind", DRAWINGS)
def test_a_figure_is_a_png_with_something_on_it(kind: str, tmp_path: Path, saved: list[Figure]):
    path = tmp_path / "new" / "figure.png"
    DRAWINGS[kind](path)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", header[16:24])
    assert width > 800
    assert height > 300
    pixels = np.asarray(saved[0].canvas.buffer_rgba())[..., :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]


@pytest.mark.parametrize("kind", DRAWINGS)
def test_the_same_data_give_the_same_bytes(kind: str, tmp_path: Path):
    DRAWINGS[kind](tmp_path / "a.png")
    DRAWINGS[kind](tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_training_shows_a_panel_for_each_kind_of_record(tmp_path: Path, drawn: list[Figure]):
    plots.plot_training(training_records(), tmp_path / "all.png")
    bare = [{"event": "step", "step": step, "loss": 3.0 - step} for step in range(2)]
    plots.plot_training(bare, tmp_path / "bare.png")
    assert [len(figure.axes) for figure in drawn] == [6, 1]
    assert titles(drawn[0])[0] == titles(drawn[1])[0] == "Loss"


def full_records() -> list[dict[str, Any]]:
    """Records of a run with everything in it."""
    records = training_records(40)
    for record in records:
        share = record["step"] / 40
        if record["event"] == "step":
            record |= {"clipped": record["step"] % 10 == 3, "memory_gib": 1.5, "router_bias_learning_rate": 1e-5}
            record |= {"output_temperature": 4 - 2 * share, "weights": {"prose": {"output_kl": share}}}
            drift = [share * 0.1, None, share * 0.3]
            entropy = [2.0, 1.0, 1.5 - share]
            record["router"] = {"kl": drift, "overlap": [1 - share, None, 1.0], "entropy": entropy}
        if record["event"] == "validation":
            record["base_losses"] = {"play": 7.0, "prose": 3.0}
    events = {"merge": 9, "bias_frozen": 20, "skipped": 4, "warning": 12, "early_stop": 39}
    return records + [{"event": event, "step": step} for event, step in events.items()]


def legend_labels(figure: Figure) -> set[str]:
    return {text.get_text() for legend in figure.legends for text in legend.get_texts()}


def lines_labelled(figure: Figure, panel: int, label: str) -> list[Any]:
    return [line for line in figure.axes[panel].get_lines() if line.get_label() == label]


def test_training_marks_the_best_validation(tmp_path: Path, drawn: list[Figure]):
    plots.plot_training(training_records(), tmp_path / "figure.png")
    labels = {text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()}
    assert labels == {"training", "validation", "best, step 30"}


def test_a_full_page_has_a_panel_for_everything_that_is_recorded(tmp_path: Path, drawn: list[Figure]):
    plots.plot_training(full_records(), tmp_path / "figure.png")
    assert [title for title in titles(drawn[0]) if title] == [
        "Loss",
        "Parts of the loss, weighted",
        "Next-token loss, validation",
        "Gradient norm, before clipping",
        "Learning rates",
        "Temperatures and weights",
        "Speed",
        "Memory of a worker",
        "Router KL(base || student)",
        "Same experts selected",
        "Router entropy",
    ]


def test_events_are_marked_where_they_happened_and_explained_below(tmp_path: Path, drawn: list[Figure]):
    plots.plot_training(full_records(), tmp_path / "figure.png")
    steps = {
        "resumed": [15, 15],
        "router biases frozen": [20, 20],
        "stopped early": [40, 40],
        "checkpoint": [10, 20, 30, 40],
        "merged with the anchor": [10],
        "warning": [13],
        "step skipped": [5],
    }
    assert legend_labels(drawn[0]) == set(steps)
    for label, expected in steps.items():
        (line,) = lines_labelled(drawn[0], 0, label)
        assert list(line.get_xdata()) == expected, label


def test_clipped_steps_are_counted_and_drawn(tmp_path: Path, drawn: list[Figure]):
    plots.plot_training(full_records(), tmp_path / "figure.png")
    (line,) = lines_labelled(drawn[0], 3, "clipped, 4 of 40 steps")
    assert list(line.get_xdata()) == [4, 14, 24, 34]


def test_only_what_changes_is_drawn_of_temperatures_and_weights(tmp_path: Path, drawn: list[Figure]):
    records = [record | {"router_temperature": 2.0} for record in full_records()]
    plots.plot_training(records, tmp_path / "figure.png")
    labels = {text.get_text() for text in drawn[0].axes[5].get_legend().get_texts()}
    assert labels == {"output temperature", "prose, output_kl"}


def test_heat_maps_show_layers_by_steps_and_leave_unknown_layers_empty(tmp_path: Path, drawn: list[Figure]):
    plots.plot_training(full_records(), tmp_path / "figure.png")
    image = drawn[0].axes[8].get_images()[0].get_array()
    assert image.shape == (3, 40)
    assert np.asarray(image[2].filled(np.nan)) == pytest.approx(np.arange(40) / 40 * 0.3)
    assert np.isnan(image[1].filled(np.nan).astype(float)).all()


def test_heat_maps_are_of_validations_where_steps_do_not_know_the_teacher(tmp_path: Path, drawn: list[Figure]):
    steps = [{"event": "step", "step": s, "loss": 1.0, "router": {"entropy": [1.0]}} for s in range(40)]
    validations = [{"event": "validation", "step": s, "router": {"kl": [0.1]}} for s in (19, 39)]
    plots.plot_training([*steps, *validations], tmp_path / "figure.png")
    images = [axes.get_images()[0] for axes in drawn[0].axes if axes.get_images()]
    assert [image.get_array().shape for image in images[:2]] == [(1, 2), (1, 40)]
    assert images[0].get_extent()[:2] == [10, 50]


def test_heat_maps_of_long_runs_are_averaged(tmp_path: Path, drawn: list[Figure]):
    records = [{"event": "step", "step": s, "loss": 1.0, "router": {"kl": [s % 2]}} for s in range(1000)]
    plots.plot_training(records, tmp_path / "figure.png")
    image = drawn[0].axes[1].get_images()[0].get_array()
    assert image.shape == (1, 200)
    assert image.mean() == pytest.approx(0.5)
    assert image.max() < 1


def test_a_figure_is_svg_by_its_suffix_and_always_the_same(tmp_path: Path):
    for name in ("a.svg", "b.svg"):
        plots.compare_runs({"a": training_records(30)}, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_another_suffix_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"page\.pdf: a figure is \.png or \.svg"):
        plots.plot_training(training_records(), tmp_path / "page.pdf")
    assert not list(tmp_path.iterdir())


def test_smoothing_keeps_constants_lines_and_ends():
    line = np.linspace(5.0, 1.0, 101)
    assert smooth(line, 0.05) == pytest.approx(line)
    noisy = line + np.random.default_rng(0).normal(0, 0.3, 101)
    found = smooth(noisy, 0.05)
    assert (found[0], found[-1]) == pytest.approx((noisy[0], noisy[-1]))
    assert np.abs(found - line).mean() < 0.7 * np.abs(noisy - line).mean()
    assert smooth(noisy, 0) is noisy


def test_smoothing_is_a_share_of_the_run(tmp_path: Path, drawn: list[Figure]):
    for share in (0.0, 0.5):
        plots.plot_training(training_records(), tmp_path / "figure.png", share)
    raw, smoothed = (lines_labelled(figure, 0, "training")[0].get_ydata() for figure in drawn)
    assert list(raw) == [record["loss"] for record in training_records() if record["event"] == "step"]
    assert np.abs(np.diff(smoothed)).sum() < np.abs(np.diff(raw)).sum()


def test_drift_draws_one_line_a_source_in_each_panel(tmp_path: Path, drawn: list[Figure]):
    plots.plot_drift(BETTER, tmp_path / "figure.png")
    panels = drawn[0].axes
    named = [[line for line in axes.get_lines() if not str(line.get_label()).startswith("_")] for axes in panels]
    assert [len(lines) for lines in named] == [2] * 6
    measures = [("router_drift", name) for name in ("kl", "tv", "top_k_overlap")]
    measures += [("router_load", name) for name in ("total_variation", "largest_ratio", "student_peak")]
    for lines, (group, name) in zip(named, measures, strict=True):
        assert lines[0].get_ydata().tolist() == BETTER["play"][group][name]
    assert named[0][0].get_linestyle() != named[0][1].get_linestyle()


def test_the_busiest_expert_of_the_base_is_drawn_beside_the_students(tmp_path: Path, drawn: list[Figure]):
    plots.plot_drift(BETTER, tmp_path / "figure.png")
    hollow = [line for line in drawn[0].axes[5].get_lines() if line.get_markerfacecolor() == "none"]
    assert hollow[0].get_ydata().tolist() == BETTER["play"]["router_load"]["base_peak"]
    assert hollow[0].get_linestyle() == "None"


def test_perplexities_far_apart_get_a_logarithmic_axis(tmp_path: Path, drawn: list[Figure]):
    plots.plot_perplexity(BETTER, tmp_path / "far.png")
    plots.plot_perplexity({"play": source_result("domain", 50, 49, (0.97, 0.99))}, tmp_path / "near.png")
    assert [figure.axes[0].get_xscale() for figure in drawn] == ["log", "linear"]
    assert ["log scale" in figure.axes[0].get_xlabel() for figure in drawn] == [True, False]


def test_perplexity_writes_both_values_and_the_change(tmp_path: Path, drawn: list[Figure]):
    plots.plot_perplexity(BETTER, tmp_path / "figure.png")
    assert {"1,126", "106", "-90.6 %", "-90.8 % to -90.3 %"} <= set(texts(drawn[0]))


@pytest.mark.parametrize(
    ("interval", "colour"),
    [((0.8, 0.9), plot_style.GREEN), ((1.1, 1.2), plot_style.ORANGE), ((0.9, 1.1), plot_style.GREY)],
)
def test_the_change_is_coloured_by_what_the_interval_supports(
    interval: tuple[float, float], colour: str, tmp_path: Path, drawn: list[Figure]
):
    ratio = sum(interval) / 2
    plots.plot_perplexity({"play": source_result("domain", 50, 50 * ratio, interval)}, tmp_path / "figure.png")
    label = next(text for text in drawn[0].axes[0].texts if text.get_fontweight() == "bold")
    assert label.get_color() == colour


def test_an_evaluation_without_any_difference_can_be_drawn(tmp_path: Path):
    same: dict[str, Any] = {"play": source_result("domain", 50, 50, (1.0, 1.0), layers=1)}
    plots.plot_perplexity(same, tmp_path / "perplexity.png")
    plots.plot_drift(same, tmp_path / "drift.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_runs_are_compared_whether_validated_or_not(tmp_path: Path, drawn: list[Figure]):
    steps_only = [record for record in training_records() if record["event"] == "step"]
    plots.compare_runs({"a": training_records(), "b": steps_only}, tmp_path / "both.png")
    plots.compare_runs({"b": steps_only}, tmp_path / "one.png")
    assert [titles(figure) for figure in drawn] == [["Training loss", "Validation loss"], ["Training loss"]]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b", "resumed"]


def test_runs_are_compared_by_the_metrics_that_are_asked_for(tmp_path: Path, drawn: list[Figure]):
    metrics = ["gradient_norm", "validation/losses/prose", "router/kl/mean"]
    runs = {"a": full_records(), "b": training_records()}
    plots.compare_runs(runs, tmp_path / "figure.png", metrics=metrics)
    assert titles(drawn[0]) == ["train/gradient_norm", "validation/losses/prose", "router/kl/mean"]
    (line,) = lines_labelled(drawn[0], 1, "a")
    assert list(line.get_ydata()) == [3.1] * 4
    assert {"a", "b", "merged with the anchor", "resumed", "warning"} <= legend_labels(drawn[0])


def test_an_unknown_metric_is_refused_with_the_nearest(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--metric gradient_nrom: no run has it; did you mean 'train/gradient_norm'"):
        plots.compare_runs({"a": training_records()}, tmp_path / "figure.png", metrics=["gradient_nrom"])
