"""The figures of a selection show its numbers, for every size, and nothing more than it knows."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from scipy.optimize import root
from selection.synthetic_selection import (
    SIZES,
    layer_selection,
    make_selection,
    source_use,
    synthetic_selection,
    synthetic_statistics,
)

from nexus_ray import plot_style
from nexus_ray.router.artefact import RouterStatistics
from nexus_ray.selection.figures.co_selection import (
    co_selection_figure,
    expected_pairs,
    grouped_order,
    judged_pairs,
    pair_log_ratios,
)
from nexus_ray.selection.figures.curves import concentration_figure, stability_figure, variance_figure
from nexus_ray.selection.figures.heatmaps import importance_figure, usage_figure
from nexus_ray.selection.figures.selection_figures import plot_selection
from nexus_ray.selection.scores import cumulative_shares


@pytest.fixture(autouse=True)
def _no_warnings():
    """Dividing by a zero total or taking the logarithm of nothing would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def labelled(axes, label: str):
    handles, labels = axes.get_legend_handles_labels()
    return handles[labels.index(label)]


def points(axes, label: str) -> np.ndarray:
    return np.asarray(labelled(axes, label).get_offsets())


@pytest.mark.parametrize(("layers", "experts", "count"), SIZES)
def test_every_size_gets_all_figures(tmp_path: Path, layers: int, experts: int, count: int):
    selection = synthetic_selection(layers, experts, count)
    paths = plot_selection(selection, synthetic_statistics(selection), tmp_path / "plots")
    assert sorted(paths) == sorted((tmp_path / "plots").iterdir())
    assert {path.name for path in paths} == {
        "expert_importance.png",
        "expert_usage.png",
        "router_variance.png",
        "concentration.png",
        "selection_stability.png",
        "co_selection.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)


def test_the_same_selection_gives_the_same_bytes(tmp_path: Path):
    selection = synthetic_selection(2, 8, 3)
    first, second = (plot_selection(selection, synthetic_statistics(selection), tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_layer_without_any_score_variance_or_use_is_drawn(tmp_path: Path):
    zeros = [0.0] * 8
    empty = layer_selection(
        0, 8, 2, ("play",), scores=zeros, explained_variance_ratio=zeros, null_explained_variance_ratio=zeros,
        total_variance=0.0, usage=zeros, by_source={"play": source_use(np.zeros(8), 2, None)},
        split_half_overlap=None, held_out_share=None, overlap_p_value=None, cause="constant",
    )  # fmt: skip
    selection = make_selection([empty])
    assert len(plot_selection(selection, None, tmp_path)) == 5
    assert np.asarray(importance_figure(selection).axes[0].images[0].get_array()).tolist() == [[1 / 8] * 8]
    held = concentration_figure(selection).axes[0]
    assert held.get_lines()[0].get_ydata() == pytest.approx(np.arange(1, 9) / 8)


def test_without_statistics_the_figure_of_pairs_of_an_earlier_selection_goes_away(tmp_path: Path):
    selection = synthetic_selection(2, 8, 3)
    plot_selection(selection, synthetic_statistics(selection), tmp_path)
    assert (tmp_path / "co_selection.png").exists()
    paths = plot_selection(selection, None, tmp_path)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert len(paths) == 5


def test_importance_shows_each_score_as_a_share_of_its_layer():
    selection = synthetic_selection(3, 16, 4)
    drawn = np.asarray(importance_figure(selection).axes[0].images[0].get_array())
    for row, layer in zip(drawn, selection.layers, strict=True):
        assert row[list(layer.ranked)] == pytest.approx(np.asarray(layer.scores) / sum(layer.scores))


def test_importance_frames_the_selected_and_crosses_the_passed_over():
    layers = [
        layer_selection(0, 8, 3, selected=(5, 1, 2), passed_over=(7,)),
        layer_selection(1, 8, 2, selected=(0, 6), passed_over=()),
    ]
    axes = importance_figure(make_selection(layers)).axes[0]
    frames, crosses = axes.collections
    framed = {tuple(np.round(path.vertices[:4].mean(axis=0)).astype(int)) for path in frames.get_paths()}
    assert framed == {(5, 0), (1, 0), (2, 0), (0, 1), (6, 1)}
    assert np.asarray(crosses.get_offsets()).tolist() == [[7, 0]]
    assert "the 2 to 3 selected" in axes.get_title(loc="left")
    assert "passed over" in axes.get_title(loc="left")
    assert "passed over" not in importance_figure(synthetic_selection(1, 8, 2)).axes[0].get_title(loc="left")


def test_layers_without_preferences_are_pale_and_the_even_share_is_marked():
    even = layer_selection(0, 16, 4, scores=[1 / 16] * 16)
    figure = importance_figure(make_selection([even, layer_selection(1, 16, 4)]))
    image = figure.axes[0].images[0]
    drawn = image.to_rgba(image.get_array())
    assert drawn[0].min() > 0.8
    assert drawn[1].min() < 0.3
    assert "6.25 %" in [label.get_text() for label in figure.axes[1].get_yticklabels()]
    alone = importance_figure(make_selection([even])).axes[0].images[0]
    assert alone.to_rgba(alone.get_array()).min() > 0.8


def test_where_all_experts_hold_the_same_weights_no_share_is_drawn():
    copies = {"cause": "identical", "verdict": "not distinguishable from noise", "share": 0.99}
    layers = [layer_selection(0, 8, 3, passed_over=(7,), **copies), layer_selection(1, 8, 3, share=0.5)]
    selection = make_selection(layers)
    axes = importance_figure(selection).axes[0]
    assert np.isnan(np.ma.filled(axes.images[0].get_array(), np.nan)[0]).all()
    assert {round(path.vertices[:4, 1].mean()) for path in axes.collections[0].get_paths()} == {1}
    assert len(axes.collections) == 1
    assert "grey: all experts hold the same weights" in axes.get_title(loc="left")
    held, above = concentration_figure(selection).axes[:2]
    assert points(held, "selected (3)").tolist() == [[3, 0.5]]
    assert len(points(above, "selected (3)")) == 1
    for axes in stability_figure(selection).axes:
        lines = [line.get_ydata() for line in axes.get_lines() if len(line.get_ydata()) == 2]
        assert lines
        assert all(np.isnan(values[0]) and np.isfinite(values[1]) for values in lines)
    assert np.isnan(points(stability_figure(selection).axes[1], "not distinguishable from noise")[:, 1]).all()


def test_copies_in_every_layer_leave_no_figure_of_the_choice(tmp_path: Path):
    plot_selection(synthetic_selection(2, 8, 3), None, tmp_path)
    copies = synthetic_selection(2, 8, 3, cause="identical", verdict="not distinguishable from noise")
    paths = plot_selection(copies, synthetic_statistics(copies), tmp_path)
    assert sorted(path.name for path in paths) == ["co_selection.png", "expert_usage.png", "router_variance.png"]
    assert sorted(paths) == sorted(tmp_path.iterdir())


def test_usage_has_a_panel_a_source_and_one_for_the_difference():
    selection = synthetic_selection(3, 8, 2)
    figure = usage_figure(selection)
    panels = [axes for axes in figure.axes if axes.images]
    usage = {name: np.asarray([layer.by_source[name].usage for layer in selection.layers]) for name in selection.tokens}
    for axes, values in zip(panels, usage.values(), strict=False):
        assert np.asarray(axes.images[0].get_array()) == pytest.approx(values)
    assert (selection.tokens["prose"], selection.tokens["code"]) == (8192, 12288)
    difference = 100 * (usage["play"] - (2 * usage["prose"] + 3 * usage["code"]) / 5)
    assert np.asarray(panels[3].images[0].get_array()) == pytest.approx(difference)
    assert titles(figure)[3] == "play minus prose + code"
    scale = panels[3].images[0].norm
    assert scale.vmin == -scale.vmax


def test_one_source_has_nothing_to_differ_from():
    selection = make_selection([layer_selection(0, 8, 2, ("play",))])
    assert len([axes for axes in usage_figure(selection).axes if axes.images]) == 1


def test_concentration_is_the_cumulative_share_beside_the_null_of_the_same_layers():
    selection = synthetic_selection(3, 16, 4)
    held, above = concentration_figure(selection).axes[:2]
    shares = cumulative_shares(np.asarray([layer.scores for layer in selection.layers]))
    null = np.asarray([layer.null_curve for layer in selection.layers])
    for index in range(3):
        assert held.get_lines()[index].get_ydata() == pytest.approx(np.cumsum(selection.layers[index].scores))
        assert above.get_lines()[index].get_ydata() == pytest.approx(shares[index] - null[index])
    label = "independent experts: mean and range of the layers"
    assert labelled(held, label).get_ydata() == pytest.approx(null.mean(axis=0))
    assert labelled(held, "the same score each").get_ydata()[[0, -1]] == pytest.approx([1 / 16, 1])


def test_concentration_marks_what_each_layer_selects():
    layers = [layer_selection(0, 8, 3, share=0.61), layer_selection(1, 8, 5, share=0.83)]
    held, above = concentration_figure(make_selection(layers)).axes[:2]
    assert points(held, "selected (3 to 5)") == pytest.approx(np.array([[3, 0.61], [5, 0.83]]))
    expected = [[3, 0.61 - layers[0].null_curve[2]], [5, 0.83 - layers[1].null_curve[4]]]
    assert points(above, "selected (3 to 5)") == pytest.approx(np.array(expected))


def test_variance_shows_all_components_their_sum_and_the_total():
    selection = synthetic_selection(3, 16, 4)
    explained, spectrum, total = variance_figure(selection).axes[:3]
    for index, layer in enumerate(selection.layers):
        assert explained.get_lines()[index].get_ydata() == pytest.approx(np.cumsum(layer.explained_variance_ratio))
        drawn = spectrum.get_lines()[index].get_ydata()
        visible = np.isfinite(drawn)
        assert drawn[visible] == pytest.approx(np.asarray(layer.explained_variance_ratio)[visible])
    null = np.mean([layer.null_explained_variance_ratio for layer in selection.layers], axis=0)
    label = "independent experts: mean and range of the layers"
    assert labelled(spectrum, label).get_ydata() == pytest.approx(null)
    assert labelled(explained, label).get_ydata() == pytest.approx(np.cumsum(null))
    assert spectrum.get_yscale() == "log"
    assert [bar.get_height() for bar in total.patches] == pytest.approx([0.1, 0.11, 0.12])


def test_rounding_in_the_last_component_does_not_stretch_the_spectrum():
    ratios = [0.6, 0.3, 0.1, 3e-17]
    layer = layer_selection(0, 4, 2, explained_variance_ratio=ratios, null_explained_variance_ratio=[0.25] * 4)
    spectrum = variance_figure(make_selection([layer])).axes[1]
    assert np.isnan(spectrum.get_lines()[0].get_ydata()[3])
    assert spectrum.get_ylim()[0] > 0.05


def test_stability_puts_each_layer_where_its_verdict_and_overlap_say():
    layers = [
        layer_selection(0, 8, 4, split_half_overlap=1.0, verdict="stable"),
        layer_selection(1, 8, 4, split_half_overlap=0.75, verdict="partly stable"),
        layer_selection(2, 8, 4, split_half_overlap=0.5, verdict="not distinguishable from noise"),
        layer_selection(3, 8, 4, split_half_overlap=0.75, verdict="stable"),
    ]
    halves, share = stability_figure(make_selection(layers)).axes
    assert points(halves, "stable").tolist() == [[0, 1.0], [3, 0.75]]
    assert points(halves, "partly stable").tolist() == [[1, 0.75]]
    assert points(halves, "not distinguishable from noise").tolist() == [[2, 0.5]]
    assert points(share, "stable").tolist() == [[0, layers[0].share], [3, layers[3].share]]
    assert labelled(halves, "random selections").get_ydata().tolist() == [0.5] * 4
    held_out = labelled(share, "experts of one half, scored on the other").get_ydata()
    assert held_out.tolist() == [layer.held_out_share for layer in layers]
    markers = [labelled(halves, verdict) for verdict in ("stable", "partly stable", "not distinguishable from noise")]
    assert len({marker.get_paths()[0].vertices.tobytes() for marker in markers}) == 3
    assert len({tuple(marker.get_facecolor()[0]) for marker in markers}) == 3


def test_the_null_share_is_drawn_up_to_its_bound():
    layers = [layer_selection(seed, 8, 4, null_share=0.6, null_share_high=0.7) for seed in range(2)]
    share = stability_figure(make_selection(layers)).axes[1]
    line, _, (bars,) = labelled(share, "independent experts, to the 95 % bound").lines
    assert line.get_ydata().tolist() == [0.6, 0.6]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [pytest.approx([0.6, 0.7])] * 2


def test_halves_too_small_to_compare_are_said_to_be():
    without = synthetic_selection(2, 8, 4, split_half_overlap=None, held_out_share=None, overlap_p_value=None)
    halves = stability_figure(without).axes[0]
    assert [text.get_text() for text in halves.texts] == ["the halves hold too little text to compare"]
    assert not stability_figure(synthetic_selection(2, 8, 4)).axes[0].texts
    mixed = make_selection([*without.layers, layer_selection(2, 8, 4)])
    assert not stability_figure(mixed).axes[0].texts


@pytest.mark.parametrize("weights", [[8, 4, 4, 2, 1], [1, 1, 1], [50, 3, 2, 2, 1], [3, 7]])
def test_experts_that_meet_by_popularity_alone_are_expected_exactly(weights: list[int]):
    pairs = np.outer(weights, weights)
    expected = expected_pairs(pairs[None])[0]
    assert expected == pytest.approx(pairs * (1 - np.eye(len(weights))), rel=1e-6)
    assert pair_log_ratios(pairs[None])[0] == pytest.approx(np.zeros_like(expected), abs=1e-6)


def test_an_expert_that_is_in_every_pair_explains_all_pairs():
    pairs = np.array([[[300, 150, 100, 50], [150, 150, 0, 0], [100, 0, 100, 0], [50, 0, 0, 50]]])
    assert expected_pairs(pairs)[0] == pytest.approx(np.where(np.eye(4) > 0, 0, pairs[0]), abs=1e-3)


def test_expected_pairs_solve_the_equations_of_quasi_independence():
    generator = np.random.default_rng(3)
    pairs = generator.integers(5, 200, (7, 7))
    pairs = pairs + pairs.T
    rows = pairs.sum(axis=1) - np.diag(pairs)
    solution = root(lambda a: a * (a.sum() - a) - rows, np.sqrt(rows.astype(float))).x
    expected = expected_pairs(pairs[None])[0]
    assert expected.sum(axis=1) == pytest.approx(rows)
    assert expected == pytest.approx(np.outer(solution, solution) * (1 - np.eye(7)), rel=1e-6)


def test_random_routing_with_unequal_popularity_shows_no_company():
    generator = np.random.default_rng(0)
    keys = np.log(np.arange(1, 9)) + generator.gumbel(size=(60_000, 8))
    chosen = (np.argsort(np.argsort(-keys, axis=1), axis=1) < 2).astype(np.int64)
    ratios = pair_log_ratios((chosen.T @ chosen)[None])[0]
    assert np.abs(ratios).max() < 0.25


def test_experts_always_chosen_together_stand_out_and_side_by_side():
    pairs = np.full((6, 6), 20)
    for first, second in ((0, 3), (1, 4), (2, 5)):
        pairs[first, second] = pairs[second, first] = 400
    ratios = pair_log_ratios(pairs[None])[0]
    assert ratios[0, 3] > 1.5
    assert ratios[0, 1] < -0.5
    order = grouped_order(ratios)
    assert sorted(order) == list(range(6))
    assert {frozenset(order[at : at + 2]) for at in (0, 2, 4)} == {
        frozenset({0, 3}),
        frozenset({1, 4}),
        frozenset({2, 5}),
    }


def test_a_pair_never_seen_and_an_expert_never_used_stay_finite():
    pairs = np.array([[0, 0, 90, 90, 0], [0, 0, 90, 90, 0], [90, 90, 0, 90, 0], [90, 90, 90, 0, 0], [0, 0, 0, 0, 0]])
    ratios = pair_log_ratios(pairs[None])[0]
    assert np.isfinite(ratios).all()
    assert ratios[4] == pytest.approx(np.zeros(5))
    assert ratios[0, 1] < -3


def test_pairs_too_rare_to_tell_from_luck_are_not_judged():
    weights = np.array([60, 40, 20, 2, 1])
    pairs = np.outer(weights, weights)
    assert judged_pairs(pairs[None])[0].tolist() == ((pairs >= 36) & ~np.eye(5, dtype=bool)).tolist(), (
        "as many as expected, so only pairs of which half as many would be three deviations off are known"
    )
    often = pairs.copy()
    often[3, 4] = often[4, 3] = 30
    assert judged_pairs(often[None])[0, 3, 4]
    never = np.array([[0, 0, 90, 90, 0], [0, 0, 90, 90, 0], [90, 90, 0, 90, 0], [90, 90, 90, 0, 0], [0, 0, 0, 0, 0]])
    judged = judged_pairs(never[None])[0]
    assert judged[0, 1]
    assert not judged[4].any()


def test_random_routing_seldom_shows_a_judged_pair_far_from_popularity():
    generator = np.random.default_rng(2)
    keys = 3 * np.log(np.arange(1, 17)) + generator.gumbel(size=(1500, 16))
    chosen = (np.argsort(np.argsort(-keys, axis=1), axis=1) < 3).astype(np.int64)
    pairs = (chosen.T @ chosen)[None]
    far = np.abs(pair_log_ratios(pairs)[0]) >= 1
    assert (far & ~np.eye(16, dtype=bool)).sum() > 10
    assert (far & judged_pairs(pairs)[0]).sum() <= 1


def test_the_end_of_the_colour_scale_that_pairs_lie_beyond_has_an_arrow():
    selection = make_selection([layer_selection(0, 12, 3, ("play",))])
    statistics = synthetic_statistics(selection)
    moments = statistics.sources["play"]
    pairs = np.full((12, 12), 400)
    pairs[0, 1] = pairs[1, 0] = 4
    packed = pairs[np.triu_indices(12)]
    together = np.stack([packed, packed])[:, None]
    only = RouterStatistics(statistics.description, {"play": replace(moments, selected_together=together)})
    bar = co_selection_figure(selection, only).axes[-1]
    image = co_selection_figure(selection, only).axes[0].images[0]
    assert np.nanmin(image.get_array()) < image.norm.vmin
    assert bar._colorbar.extend == "min"


def test_the_map_counts_the_chosen_sources_and_marks_the_selected():
    selection = make_selection([layer_selection(seed, 8, 3) for seed in range(5)], sources=("play", "code"))
    statistics = synthetic_statistics(selection)
    figure = co_selection_figure(selection, statistics)
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in maps] == [f"layer {index}" for index in range(5)]
    together = 2 * statistics.sources["play"].co_selection().sum(axis=0)
    for index, axes in enumerate(maps):
        ratios, judged = (function(together[index : index + 1])[0] for function in (pair_log_ratios, judged_pairs))
        order = grouped_order(np.where(judged, ratios, 0))
        drawn = np.ma.filled(axes.images[0].get_array(), np.nan)
        expected = np.where(judged, ratios, np.nan)[np.ix_(order, order)]
        assert drawn == pytest.approx(expected, nan_ok=True)
        assert [int(label.get_text()) for label in axes.get_xticklabels()] == order
        strip = axes.collections[-1]
        assert tuple(strip.get_facecolor()[0]) == to_rgba(plot_style.YELLOW)
        marked = {order[round(path.vertices[:4, 0].mean())] for path in strip.get_paths()}
        assert marked == set(selection.layers[index].selected)
        assert axes.images[0].norm.vcenter == 0
        assert axes.images[0].norm.vmin == -axes.images[0].norm.vmax


def test_a_router_that_selects_one_expert_has_no_map_of_pairs(tmp_path: Path):
    selection = synthetic_selection(2, 8, 3)
    statistics = synthetic_statistics(selection, experts_per_token=1)
    assert co_selection_figure(selection, statistics) is None
    assert len(plot_selection(selection, statistics, tmp_path)) == 5
