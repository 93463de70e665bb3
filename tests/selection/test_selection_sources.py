"""Which experts serve which text: experts of one text, and whether two texts differ by more than luck."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from selection.report_text import render_of, table
from selection.synthetic_selection import (
    layer_selection,
    make_selection,
    source_use,
    synthetic_selection,
    synthetic_statistics,
)

from nexus_ray.router.artefact import RouterStatistics
from nexus_ray.router.moments import RouterMoments
from nexus_ray.selection.record import LayerSelection, Selection
from nexus_ray.selection.report.report import render
from nexus_ray.selection.report.sources import (
    Comparison,
    Pairwise,
    compare_sources,
    exclusive_experts,
    share_of_selections,
)


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
