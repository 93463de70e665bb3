"""Selection on statistics with a known answer, its file, and its errors."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.config import SelectSection
from nexus_ray.errors import ArtefactError, ConfigError, DataError
from nexus_ray.layout import RunLayout
from nexus_ray.router.artefact import Description, RouterStatistics
from nexus_ray.router.moments import RouterMoments
from nexus_ray.selection.plots import plot_selection
from nexus_ray.selection.scores import pca_scores, rank_experts
from nexus_ray.selection.selection import Selection, select, select_experts

EXPERTS, TOP_K, LENGTH = 16, 2, 64
PLANTED = {"play": ([1, 6, 12, 15], [0, 4, 9, 13]), "prose": ([2, 5, 8, 11], [3, 7, 10, 14])}


def planted_moments(source: str, sequences: int = 12, experts: int = EXPERTS) -> RouterMoments:
    """Two layers in which four experts take turns and the others are noise."""
    generator = torch.Generator().manual_seed(len(source))
    logits = torch.randn(sequences, LENGTH, 2, experts, generator=generator) * 0.1
    for layer, planted in enumerate(PLANTED[source]):
        turn = torch.randint(4, (sequences, LENGTH), generator=generator)
        hot = torch.tensor(planted)[turn]
        logits[:, :, layer].scatter_(2, hot[..., None], 4.0)
    return RouterMoments.from_logits(logits, np.ones((sequences, LENGTH), bool), np.arange(sequences) % 2, TOP_K)


def noise_moments(sequences: int = 64) -> RouterMoments:
    logits = torch.randn(sequences, LENGTH, 1, EXPERTS, generator=torch.Generator().manual_seed(5))
    return RouterMoments.from_logits(logits, np.ones((sequences, LENGTH), bool), np.arange(sequences) % 2, TOP_K)


def statistics_of(sources: dict[str, RouterMoments], base_fingerprint: str = "base") -> RouterStatistics:
    first = next(iter(sources.values()))
    description = Description(
        base_fingerprint=base_fingerprint,
        tokenizer_sha256="tokenizer",
        sequence_length=LENGTH,
        layers=first.layers,
        experts=first.experts,
        experts_per_token=TOP_K,
        tokens={name: moments.tokens for name, moments in sources.items()},
    )
    return RouterStatistics(description, sources)


@pytest.fixture(scope="module")
def planted() -> RouterStatistics:
    return statistics_of({name: planted_moments(name) for name in PLANTED})


@pytest.mark.parametrize("method", ["pca", "usage"])
@pytest.mark.parametrize("source", ["play", "prose"])
def test_planted_experts_are_selected_from_the_chosen_source(planted, method, source):
    selection = select_experts(planted, SelectSection(method=method, top_k=4), (source,))
    for layer, experts in zip(selection.layers, PLANTED[source], strict=True):
        assert set(layer.selected) == set(experts)
        assert layer.split_half_overlap == 1.0
        assert layer.share > 2 * selection.chance_overlap
        assert sorted(layer.ranked) == list(range(EXPERTS))


def test_two_sources_count_together(planted):
    selection = select_experts(planted, SelectSection(top_k=8), ("play", "prose"))
    for layer, parts in zip(selection.layers, zip(*PLANTED.values(), strict=True), strict=True):
        assert set(layer.selected) == set(parts[0]) | set(parts[1])
    pooled = planted.sources["play"].merge(planted.sources["prose"]).both_halves()
    expected = rank_experts(pca_scores(pooled.covariance()[0, 1], 20))
    assert selection.experts(1) == expected


def test_usage_by_source_shows_which_experts_serve_which_text(planted):
    layer = select_experts(planted, SelectSection(top_k=4), ("play",)).layers[0]
    for source, (experts, _) in PLANTED.items():
        usage = np.asarray(layer.usage_by_source[source])
        assert usage.sum() == pytest.approx(1)
        # each token's first choice is one of the four; its second is noise
        assert usage[experts].sum() > 0.5
    assert layer.usage == pytest.approx(layer.usage_by_source["play"])


def test_ranking_orders_by_usage_and_by_importance(planted):
    selection = select_experts(planted, SelectSection(top_k=4), ("play",))
    ranking = selection.ranking()
    assert list(ranking.important[1]) == selection.experts(1)
    counts = planted.sources["play"].selected.sum(axis=0)
    assert [counts[0][expert] for expert in ranking.used[0]] == sorted(counts[0], reverse=True)
    assert ranking.used_overall == int(counts.sum(axis=0).argmax())


def test_reap_ranks_by_saliency_and_is_recorded(ranked_run):
    _, layout, selection = ranked_run(**{"select.method": "reap"})
    saliency = RouterStatistics.load(layout.router_stats).sources["play"].both_halves().saliency()[0]
    for layer, expected in zip(selection.layers, saliency, strict=True):
        assert layer.reap == pytest.approx(expected)
        assert list(layer.ranked) == np.argsort(-expected, kind="stable").tolist()
        assert list(layer.scores) == sorted(expected, reverse=True)
        assert layer.null_share == pytest.approx(4 / 8)
    assert list(selection.ranking().reap[1]) == list(selection.layers[1].ranked)
    assert Selection.load(layout.selection) == selection
    assert len(plot_selection(selection, layout.plots)) == 4


def test_reap_is_ranked_beside_every_other_method(ranked_run):
    _, _, selection = ranked_run(**{"select.method": "usage"})
    assert list(selection.ranking().reap[0]) == np.argsort(-np.asarray(selection.layers[0].reap)).tolist()


def test_reap_without_recorded_outputs_is_refused_and_absent_elsewhere(ranked_run):
    _, _, selection = ranked_run(with_norms=False)
    assert selection.layers[0].reap is None
    assert selection.ranking().reap is None
    with pytest.raises(ArtefactError, match="no expert output norms"):
        ranked_run(with_norms=False, **{"select.method": "reap"})


def test_noise_has_the_share_of_its_null_model_and_chance_overlap():
    statistics = statistics_of({"play": noise_moments()})
    selection = select_experts(statistics, SelectSection(top_k=4), ("play",))
    layer = selection.layers[0]
    assert layer.share == pytest.approx(layer.null_share, abs=0.03)
    assert selection.chance_overlap == 0.25
    assert layer.split_half_overlap < 0.8


def test_one_sequence_has_no_second_half_to_compare_with():
    statistics = statistics_of({"play": planted_moments("play", sequences=1)})
    assert select_experts(statistics, SelectSection(top_k=4), ("play",)).layers[0].split_half_overlap is None


def test_selection_file_holds_everything(planted, tmp_path):
    selection = select_experts(planted, SelectSection(top_k=4), ("play",))
    selection.save(tmp_path / "selection.json")
    assert Selection.load(tmp_path / "selection.json") == selection


def test_a_damaged_selection_is_refused(tmp_path):
    path = tmp_path / "selection.json"
    with pytest.raises(ArtefactError, match="no expert selection"):
        Selection.load(path)
    path.write_text('{"layers": 3}')
    with pytest.raises(ArtefactError, match="not an expert selection"):
        Selection.load(path)


def test_more_experts_than_there_are_is_a_configuration_error(planted):
    with pytest.raises(ConfigError, match=r"select\.top_k is 17, but a layer has 16 experts"):
        select_experts(planted, SelectSection(top_k=17), ("play",))


def test_too_little_text_is_refused():
    valid = np.zeros((2, LENGTH), bool)
    valid[:, :5] = True
    few = RouterMoments.from_logits(torch.randn(2, LENGTH, 1, EXPERTS), valid, np.arange(2), TOP_K)
    with pytest.raises(DataError, match="10 tokens, too few for 16 experts"):
        select_experts(statistics_of({"play": few}), SelectSection(top_k=4), ("play",))


def test_a_source_without_statistics_is_refused(planted):
    with pytest.raises(ArtefactError, match="no source 'code'"):
        select_experts(planted, SelectSection(top_k=4), ("code",))


def write_statistics(layout: RunLayout, base_fingerprint: str) -> None:
    sources = {}
    for name in PLANTED:
        logits = torch.randn(4, LENGTH, 2, 8, generator=torch.Generator().manual_seed(len(name)))
        sources[name] = RouterMoments.from_logits(logits, np.ones((4, LENGTH), bool), np.arange(4) % 2, TOP_K)
    statistics_of(sources, base_fingerprint).save(layout.router_stats)


def test_select_uses_the_domain_by_default(micro_config, micro_model, tmp_path):
    layout = RunLayout(tmp_path / "run")
    write_statistics(layout, fingerprint(micro_model))
    selection = select(micro_config(layout.directory), layout)
    assert selection.sources == ("play",)
    assert Selection.load(layout.selection) == selection
    chosen = micro_config(layout.directory, **{"select.sources": ["prose"]})
    assert select(chosen, layout).layers != selection.layers


def test_statistics_of_another_base_are_refused(micro_config, tmp_path):
    layout = RunLayout(tmp_path / "run")
    write_statistics(layout, "another base")
    with pytest.raises(ArtefactError, match="collected from another model"):
        select(micro_config(layout.directory), layout)
    assert not layout.selection.exists()


def test_tensors_of_another_run_are_refused(planted, tmp_path):
    planted.save(tmp_path / "router_stats.safetensors")
    other = statistics_of({name: planted_moments(name, sequences=3) for name in PLANTED})
    other.save(tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").replace(tmp_path / "router_stats.safetensors")
    with pytest.raises(ArtefactError, match="not the file that the description"):
        RouterStatistics.load(tmp_path / "router_stats.safetensors")


def test_statistics_load_as_saved(planted, tmp_path):
    planted.save(tmp_path / "router_stats.safetensors")
    loaded = RouterStatistics.load(tmp_path / "router_stats.safetensors")
    assert loaded.description.tokens == planted.description.tokens
    for name, moments in planted.sources.items():
        np.testing.assert_array_equal(loaded.sources[name].m2, moments.m2)


@pytest.mark.parametrize(("layers", "experts", "sources"), [(1, 2, 1), (2, 16, 2), (3, 128, 3)])
def test_figures_of_any_shape_are_drawn_from_the_selection_alone(tmp_path: Path, layers, experts, sources):
    logits = torch.randn(4, LENGTH, layers, experts, generator=torch.Generator().manual_seed(0))
    moments = RouterMoments.from_logits(logits, np.ones((4, LENGTH), bool), np.arange(4) % 2, 1)
    statistics = statistics_of({f"source {index}": moments for index in range(sources)})
    selection = select_experts(statistics, SelectSection(top_k=2), ("source 0",))
    paths = plot_selection(selection, tmp_path / "plots")
    assert sorted(paths) == sorted((tmp_path / "plots").iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)
