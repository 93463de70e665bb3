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

BETTER = evaluation((1126.0, 106.0, (0.092, 0.097)), (51.0, 51.1, (0.995, 1.009)))
DRAWINGS: dict[str, Callable[[Path], None]] = {
    "training": lambda path: plots.plot_training(training_records(), path),
    "drift": lambda path: plots.plot_drift(BETTER, path),
    "perplexity": lambda path: plots.plot_perplexity(BETTER, path),
    "compare": lambda path: plots.compare_runs({"a": training_records(30), "b": training_records(20)}, path),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
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
def test_a_figure_is_a_png_with_something_on_it(kind: str, tmp_path: Path, drawn: list[Figure]):
    path = tmp_path / "new" / "figure.png"
    DRAWINGS[kind](path)
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", header[16:24])
    assert width > 800
    assert height > 300
    pixels = np.asarray(drawn[0].canvas.buffer_rgba())[..., :3]
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
    assert [len(figure.axes) for figure in drawn] == [5, 1]
    assert titles(drawn[0])[0] == titles(drawn[1])[0] == "Loss"


def test_training_marks_the_best_validation_and_the_resume(tmp_path: Path, drawn: list[Figure]):
    plots.plot_training(training_records(), tmp_path / "figure.png")
    labels = drawn[0].axes[0].get_legend_handles_labels()[1]
    assert {"training", "validation", "best, step 30", "resumed", "checkpoint"} == set(labels)


def test_smoothing_keeps_constants_lines_and_ends():
    line = np.linspace(5.0, 1.0, 101)
    assert plots._smooth(line) == pytest.approx(line)
    noisy = line + np.random.default_rng(0).normal(0, 0.3, 101)
    smooth = plots._smooth(noisy)
    assert (smooth[0], smooth[-1]) == pytest.approx((noisy[0], noisy[-1]))
    assert np.abs(smooth - line).mean() < 0.7 * np.abs(noisy - line).mean()


def test_drift_draws_one_line_a_source_in_each_of_three_panels(tmp_path: Path, drawn: list[Figure]):
    plots.plot_drift(BETTER, tmp_path / "figure.png")
    assert [len(axes.get_lines()) for axes in drawn[0].axes] == [2, 2, 2]
    assert drawn[0].axes[0].get_lines()[0].get_ydata().tolist() == BETTER["play"]["router_drift"]["kl"]
    assert drawn[0].axes[0].get_lines()[0].get_linestyle() != drawn[0].axes[0].get_lines()[1].get_linestyle()


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
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b"]
