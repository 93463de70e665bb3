"""Selection on routers with a known answer: what is found, what is called noise, and what is refused."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from synthetic_routers import moments_of, noise_logits, planted_logits, statistics_of
from transformers import AutoTokenizer, GptOssForCausalLM

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.quantised_export import export_mxfp4
from nexus_ray.config import SelectSection
from nexus_ray.data.vocabulary import tokenizer_digest
from nexus_ray.errors import ArtefactError, ConfigError, DataError
from nexus_ray.layout import RunLayout
from nexus_ray.router.artefact import RouterStatistics
from nexus_ray.router.moments import RouterMoments
from nexus_ray.selection.methods import METHODS
from nexus_ray.selection.record import NOISE, Selection
from nexus_ray.selection.report.report import render
from nexus_ray.selection.scores import pca_scores, principal_components, rank_experts
from nexus_ray.selection.selection import select, select_experts

EXPERTS = 16
PLANTED = {"play": [[1, 6, 12, 15], [0, 4, 9, 13]], "prose": [[2, 5, 8, 11], [3, 7, 10, 14]]}
UNIT_NORMS = torch.ones(EXPERTS)


def selected_from(statistics: RouterStatistics, *sources: str, identical: tuple[int, ...] = (), **section: object):
    return select_experts(statistics, SelectSection.model_validate(section), sources, identical)


@pytest.fixture(scope="module")
def planted() -> RouterStatistics:
    """Two layers and sources in which four experts take turns."""
    norms = torch.linspace(1, 2, EXPERTS)
    sources = enumerate(PLANTED)
    return statistics_of(
        {name: moments_of(planted_logits(PLANTED[name], EXPERTS, seed=seed), norms) for seed, name in sources}
    )


@pytest.mark.parametrize("method", ["pca", "pca_variance", "usage", "gate_mass"])
@pytest.mark.parametrize("source", PLANTED)
def test_planted_experts_are_found_and_called_stable(planted, method, source):
    selection = selected_from(planted, source, method=method, top_k=4)
    for layer, experts in zip(selection.layers, PLANTED[source], strict=True):
        assert set(layer.selected) == set(experts)
        assert layer.verdict == "stable"
        assert layer.split_half_overlap == 1.0
        assert layer.overlap_p_value == pytest.approx(stats.hypergeom(EXPERTS, 4, 4).pmf(4))
        assert layer.held_out_share == pytest.approx(layer.share, abs=0.02)
        assert layer.share > 0.5
        assert layer.chance_overlap == 0.25
        assert sorted(layer.ranked) == list(range(EXPERTS))
    assert selection.verdicts() == {"stable": 2, "partly stable": 0, NOISE: 0}


def test_a_share_of_a_spectrum_is_held_against_that_of_the_same_variances(planted):
    """The planted experts vary most, so the best of independent experts with these variances hold as much."""
    spectrum, counts = (selected_from(planted, "play", method=name, top_k=4).layers[0] for name in ("pca", "usage"))
    assert spectrum.share == pytest.approx(spectrum.null_share, abs=0.002)
    assert spectrum.distribution.pattern == spectrum.distribution.null_pattern == "steep cliff"
    assert counts.concentrated
    assert 0.25 < counts.null_share < counts.null_share_high < 0.3
    assert counts.distribution.null_pattern != counts.distribution.pattern


def test_a_share_that_only_correlation_gives_is_called_concentrated():
    """Independent columns of one variance, but that four of them rise and fall together."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(16, 64, 1, 64)) * 0.2
    logits[..., [1, 6, 12, 15]] = rng.normal(size=(16, 64, 1, 1)) * 0.2
    statistics = statistics_of({"play": moments_of(torch.tensor(logits).float())})
    layer = selected_from(statistics, "play", method="pca_variance", components=1, top_k=4).layers[0]
    assert set(layer.selected) == {1, 6, 12, 15}
    assert layer.concentrated
    assert "more concentrated than chance" in layer.reason


def test_experts_of_planted_norm_are_found_by_reap():
    norms = torch.ones(EXPERTS).index_fill(0, torch.tensor([2, 3, 9]), 4.0)
    statistics = statistics_of({"play": moments_of(noise_logits(2, EXPERTS), norms)})
    for layer in selected_from(statistics, "play", method="reap", top_k=3).layers:
        assert set(layer.selected) == {2, 3, 9}
        assert (layer.verdict, layer.concentrated) == ("stable", True)
        assert [layer.reap[expert] for expert in layer.ranked] == list(layer.scores)


@pytest.mark.parametrize("method", METHODS)
def test_routers_without_structure_are_called_noise(method):
    layers, experts, top_k = 150, 32, 8
    statistics = statistics_of({"play": moments_of(noise_logits(layers, experts), torch.ones(experts))})
    selection = selected_from(statistics, "play", method=method, top_k=top_k)
    # the chance of even one other verdict is 5 %
    assert selection.verdicts()[NOISE] >= layers - 1
    overlaps = [round(layer.split_half_overlap * top_k) for layer in selection.layers]
    assert np.mean(overlaps) == pytest.approx(top_k**2 / experts, abs=0.3)
    expected = stats.hypergeom(experts, top_k, top_k)
    for common in (3, 4, 5):
        as_many = sum(overlap >= common for overlap in overlaps)
        assert as_many <= stats.binom(layers, expected.sf(common - 1)).ppf(0.999)
    assert np.mean([layer.held_out_share for layer in selection.layers]) == pytest.approx(top_k / experts, abs=0.01)
    assert np.mean([layer.share - layer.null_share for layer in selection.layers]) == pytest.approx(0, abs=0.01)


def test_sources_count_together_weighted_by_their_tokens(planted):
    selection = selected_from(planted, "play", "prose", top_k=8)
    for layer, parts in zip(selection.layers, zip(*PLANTED.values(), strict=True), strict=True):
        assert set(layer.selected) == set(parts[0]) | set(parts[1])
    pooled = planted.sources["play"].merge(planted.sources["prose"]).both_halves()
    principal = principal_components(pooled.covariance()[0, 1])
    assert selection.experts(1) == rank_experts(pca_scores(principal, 20))
    assert selection.layers[1].explained_variance_ratio == pytest.approx(principal.explained_variance_ratio)
    assert len(selection.layers[1].null_explained_variance_ratio) == EXPERTS
    assert sum(selection.layers[1].null_explained_variance_ratio) == pytest.approx(1)


def test_use_by_source_shows_which_experts_serve_which_text(planted):
    selection = selected_from(planted, "play", top_k=4)
    for source, layers in PLANTED.items():
        for layer, experts in zip(selection.layers, layers, strict=True):
            use = layer.by_source[source]
            assert sum(use.usage) == pytest.approx(1)
            assert set(use.selected) == set(experts)
            assert use.split_half_overlap == 1.0
            assert min(use.usage[expert] for expert in experts) > 0.1
    assert selection.layers[0].usage == pytest.approx(selection.layers[0].by_source["play"].usage)


def test_a_duplicate_of_a_better_expert_is_passed_over():
    logits = planted_logits([[1, 6, 12, 15]], EXPERTS)
    logits[..., 3] = logits[..., 6] - 0.01
    statistics = statistics_of({"play": moments_of(logits)})
    kept = selected_from(statistics, "play", top_k=5).layers[0]
    assert set(kept.selected) >= {3, 6}
    assert kept.passed_over == ()
    layer = selected_from(statistics, "play", top_k=5, max_correlation=0.9).layers[0]
    assert layer.passed_over == (3,) == layer.ranked[-1:]
    assert 3 not in layer.selected
    assert set(layer.selected) >= {1, 6, 12, 15}
    assert dict(zip(layer.ranked, layer.scores, strict=True)) == dict(zip(kept.ranked, kept.scores, strict=True))
    of_the_others = sum(layer.scores[:-1])
    assert layer.share == pytest.approx(sum(layer.scores[:5]) / of_the_others)
    assert layer.chance_overlap == 5 / 15


def test_halves_keep_the_experts_that_the_whole_text_keeps():
    """The duplicate is used more than four of the five planted experts: a half that took it would score otherwise."""
    logits = planted_logits([[6, 6, 1, 12, 15, 8]], EXPERTS)
    logits[..., 3] = logits[..., 6] - 0.01
    statistics = statistics_of({"play": moments_of(logits)})
    layer = selected_from(statistics, "play", method="usage", top_k=5, max_correlation=0.9).layers[0]
    assert set(layer.selected) == {1, 6, 12, 15, 8}
    assert layer.ranked[-1] == 3
    assert layer.split_half_overlap == 1.0
    assert layer.held_out_share == pytest.approx(layer.share, abs=0.01)


@pytest.fixture(scope="module")
def twins() -> RouterStatistics:
    """20 layers of 8 experts, 4 of them planted, and an interchangeable twin of each: which one leads is luck."""
    planted = planted_logits([list(np.random.default_rng(layer).permutation(8)[:4]) for layer in range(20)], 8)
    logits = planted.repeat(1, 1, 1, 2)
    return statistics_of({"play": moments_of(logits + 0.01 * noise_logits(20, 16, seed=9))})


@pytest.mark.parametrize("method", ["pca", "usage"])
def test_halves_that_find_the_same_groups_agree_whichever_twin_leads(twins, method):
    for layer in selected_from(twins, "play", method=method, top_k=4, max_correlation=0.9).layers:
        assert len(layer.passed_over) == 8
        assert {expert % 8 for expert in layer.ranked[:8]} == set(range(8))
        assert layer.split_half_overlap == 1.0
        assert layer.overlap_p_value == pytest.approx(stats.hypergeom(8, 4, 4).pmf(4))
        assert layer.chance_overlap == 4 / 8
        assert layer.held_out_share == pytest.approx(layer.share, abs=0.01)


def test_share_and_null_share_are_of_the_same_experts():
    """Eight groups of two copies, without structure: half of the kept experts have about half of their score."""
    logits = noise_logits(40, 8).repeat(1, 1, 1, 2) + 0.01 * noise_logits(40, 16, seed=9)
    statistics = statistics_of({"play": moments_of(logits)})
    selection = selected_from(statistics, "play", method="usage", top_k=4, max_correlation=0.9)
    for layer in selection.layers:
        assert len(layer.passed_over) == 8
        assert layer.chance_overlap == 0.5
        assert layer.null_share == pytest.approx(0.53, abs=0.03)
    assert sum(layer.concentrated for layer in selection.layers) <= stats.binom(40, 0.08).ppf(0.99)
    assert selection.verdicts()[NOISE] >= 39


def test_selecting_all_that_are_kept_is_no_choice(twins):
    layer = selected_from(twins, "play", method="usage", top_k=10, max_correlation=0.9).layers[0]
    assert (layer.cause, layer.chance_overlap, layer.share) == ("everything_selected", 1.0, pytest.approx(1))
    assert len(layer.selected) == 10


def test_coverage_is_of_the_score_of_the_kept(twins):
    layer = selected_from(twins, "play", method="pca_variance", coverage=0.9, max_correlation=0.9).layers[0]
    assert len(layer.selected) == 4
    assert layer.share >= 0.9


def test_reap_chooses_among_the_experts_that_got_a_token():
    """Twelve of 16 experts are never reached: what they would put out is not known, so that chance skips them too."""
    logits = noise_logits(1, EXPERTS)
    logits[..., 4:] -= 50
    statistics = statistics_of({"play": moments_of(logits, torch.linspace(4, 1, EXPERTS))})
    layer = selected_from(statistics, "play", method="reap", top_k=2).layers[0]
    assert set(layer.selected) == {0, 1}
    assert layer.chance_overlap == 2 / 4
    assert layer.overlap_p_value == pytest.approx(stats.hypergeom(4, 2, 2).pmf(2))
    assert set(layer.ranked[4:]) == set(range(4, EXPERTS))
    assert layer.null_share < 0.6


def test_reap_passes_over_in_what_it_averages():
    logits = planted_logits([[1, 6, 12, 15]], EXPERTS)
    logits[..., 3] = logits[..., 6] - 0.01
    statistics = statistics_of({"play": moments_of(logits, UNIT_NORMS)})
    selection = selected_from(statistics, "play", method="reap", top_k=4, max_correlation=0.9)
    assert selection.layers[0].passed_over in {(3,), (6,)}
    assert selection.ranking().reap == selection.ranking().important == [selection.layers[0].ranked]


def test_experts_that_no_token_reaches_do_not_make_a_choice_stable():
    """Two experts serve everything; the other six of eight are the first of those never used, in either half."""
    logits = noise_logits(1, 32)
    logits[..., [20, 30]] += 20
    layer = selected_from(statistics_of({"play": moments_of(logits)}), "play", method="usage", top_k=8).layers[0]
    assert set(layer.selected) >= {20, 30}
    assert (layer.verdict, layer.split_half_overlap) == (NOISE, 2 / 8)
    assert layer.by_source["play"].split_half_overlap == 2 / 8


def test_each_layer_takes_as_many_experts_as_its_score_needs():
    logits = planted_logits([[1, 6, 12, 15], [0, 4, 9, 13, 2, 5, 8, 11]], EXPERTS)
    selection = selected_from(statistics_of({"play": moments_of(logits)}), "play", method="pca_variance", coverage=0.9)
    assert [set(layer.selected) for layer in selection.layers] == [{1, 6, 12, 15}, {0, 4, 9, 13, 2, 5, 8, 11}]
    assert [layer.chance_overlap for layer in selection.layers] == [0.25, 0.5]
    assert all(layer.share >= 0.9 for layer in selection.layers)
    assert [len(layer.by_source["play"].selected) for layer in selection.layers] == [4, 8]
    assert selection.ranking().counts == [4, 8]
    assert "4 to 8 of 16 experts" in selection.summary()


@pytest.mark.parametrize("rounding", [0.0, 1e-6])
@pytest.mark.parametrize("method", METHODS)
def test_a_constant_router_is_noise_however_uneven_it_is(method, rounding):
    logits = torch.linspace(0, 3, EXPERTS) + noise_logits(1, EXPERTS) * rounding
    selection = selected_from(statistics_of({"play": moments_of(logits, UNIT_NORMS)}), "play", method=method, top_k=2)
    assert selection.layers[0].verdict == NOISE
    assert "same probabilities" in selection.layers[0].reason


def test_identical_experts_are_noise_however_well_the_halves_agree(planted):
    selection = selected_from(planted, "play", method="usage", identical=(1,), top_k=4)
    assert [(layer.verdict, layer.cause) for layer in selection.layers] == [
        ("stable", "agreement"),
        (NOISE, "identical"),
    ]
    assert "any choice gives the same shared expert" in selection.layers[1].reason
    assert selection.layers[1].split_half_overlap == 1.0
    assert selection.verdicts() == {"stable": 1, "partly stable": 0, NOISE: 1}


def test_layers_without_a_choice_count_for_nothing_in_all_layers_together(planted):
    both, one, none = (
        selected_from(planted, "play", method="usage", identical=identical, top_k=4) for identical in ((), (1,), (0, 1))
    )
    alone = stats.hypergeom(EXPERTS, 4, 4).pmf(4)
    assert [both.pooled_overlap_p_value, one.pooled_overlap_p_value] == pytest.approx([alone**2, alone])
    assert none.pooled_overlap_p_value is None
    assert [each.expected_above_null for each in (both, one, none)] == pytest.approx([0.1, 0.05, 0])
    assert [sum(layer.concentrated for layer in each.layers) for each in (both, one, none)] == [2, 1, 0]
    assert one.layers[1].share > one.layers[1].null_share_high


def test_a_planted_choice_of_few_experts_is_stable_by_all_layers_together():
    """4 of 8 experts: full agreement is one in 70, above 0.05 / 4, in each of 4 layers."""
    planted = [[0, 2, 4, 6], [1, 2, 3, 5], [0, 1, 6, 7], [3, 4, 5, 7]]
    selection = selected_from(statistics_of({"play": moments_of(planted_logits(planted, 8))}), "play", top_k=4)
    assert [set(layer.selected) for layer in selection.layers] == [set(experts) for experts in planted]
    assert {(layer.verdict, layer.cause) for layer in selection.layers} == {("stable", "pooled")}
    assert selection.pooled_overlap_p_value == pytest.approx(70.0**-4)


def test_few_experts_without_structure_stay_noise():
    selection = selected_from(statistics_of({"play": moments_of(noise_logits(6, 8))}), "play", top_k=4)
    assert {(layer.verdict, layer.cause) for layer in selection.layers} == {(NOISE, "too_few_experts")}
    assert selection.pooled_overlap_p_value > 0.05


def test_two_experts_that_sum_to_one_vary_alike_and_neither_has_more_than_its_half():
    selection = selected_from(statistics_of({"play": moments_of(noise_logits(40, 2))}), "play", top_k=1)
    assert not any(layer.concentrated for layer in selection.layers)


def test_selecting_every_expert_is_no_choice(planted):
    layer = selected_from(planted, "play", top_k=EXPERTS).layers[0]
    assert (layer.verdict, layer.split_half_overlap, layer.overlap_p_value) == (NOISE, 1.0, 1.0)
    assert "nothing to choose" in layer.reason


def test_one_sequence_has_no_second_half_to_compare_with():
    statistics = statistics_of({"play": moments_of(planted_logits(PLANTED["play"], EXPERTS, sequences=1))})
    layer = selected_from(statistics, "play", top_k=4).layers[0]
    assert (layer.verdict, layer.split_half_overlap, layer.overlap_p_value, layer.held_out_share) == (
        NOISE,
        *3 * [None],
    )
    assert "the halves hold 64 and 0 tokens" in layer.reason
    assert layer.by_source["play"].split_half_overlap is None


def test_a_half_of_fewer_tokens_than_experts_is_enough_for_counts_but_not_for_a_spectrum():
    logits = planted_logits(PLANTED["play"], EXPERTS, sequences=2)[:, :12]
    statistics = statistics_of({"play": moments_of(logits)})
    spectrum, counts = (selected_from(statistics, "play", method=name, top_k=4).layers[0] for name in ("pca", "usage"))
    assert spectrum.split_half_overlap is None
    assert "at least 17 in each" in spectrum.reason
    assert counts.split_half_overlap is not None


def test_the_summary_says_how_many_layers_are_stable_and_how_many_noise(planted):
    selection = selected_from(planted, "play", "prose", identical=(0,), top_k=8)
    summary = selection.summary()
    assert "8 of 16 experts by pca on play + prose" in summary
    assert f"stable in 1, {NOISE} in 1 of 2 layers" in summary
    above = sum(layer.concentrated for layer in selection.layers)
    assert summary.endswith(f"is above the null model's in {above}, where chance would give 0.1.")


def test_ranking_orders_by_usage_and_by_importance(planted):
    selection = selected_from(planted, "play", top_k=4)
    ranking = selection.ranking()
    assert list(ranking.important[1]) == selection.experts(1)
    counts = planted.sources["play"].selected.sum(axis=0)
    assert [counts[0][expert] for expert in ranking.used[0]] == sorted(counts[0], reverse=True)
    assert ranking.used_overall == int(counts.sum(axis=0).argmax())


def test_reap_is_ranked_beside_every_other_method(planted):
    selection = selected_from(planted, "play", method="usage", top_k=4)
    saliency = planted.sources["play"].both_halves().saliency()[0]
    for layer in range(2):
        assert list(selection.ranking().reap[layer]) == np.argsort(-saliency[layer], kind="stable").tolist()
        assert selection.layers[layer].reap == pytest.approx(saliency[layer])


def test_reap_without_recorded_outputs_is_refused_and_absent_elsewhere():
    statistics = statistics_of({"play": moments_of(noise_logits(1, EXPERTS))})
    selection = selected_from(statistics, "play", top_k=4)
    assert selection.layers[0].reap is None
    assert selection.ranking().reap is None
    with pytest.raises(ArtefactError, match="no expert output norms"):
        selected_from(statistics, "play", method="reap", top_k=4)


def test_more_experts_than_there_are_is_a_configuration_error(planted):
    with pytest.raises(ConfigError, match=r"select\.top_k is 17, but a layer has 16 experts"):
        selected_from(planted, "play", top_k=17)
    assert selected_from(planted, "play", top_k=17, coverage=0.5).layers[0].selected


def test_too_little_text_is_refused():
    few = moments_of(noise_logits(1, EXPERTS, sequences=2, length=5))
    with pytest.raises(DataError, match="10 tokens, too few for 16 experts"):
        selected_from(statistics_of({"play": few}), "play", top_k=4)


def test_a_source_without_statistics_is_refused(planted):
    with pytest.raises(ArtefactError, match="no source 'code'"):
        selected_from(planted, "code", top_k=4)


def write_statistics(layout: RunLayout, model: Path, **description: str) -> None:
    """Statistics of a model of 2 layers and 8 experts."""
    own = {
        "base_fingerprint": fingerprint(model),
        "tokenizer_sha256": tokenizer_digest(AutoTokenizer.from_pretrained(model)),
    }
    sources: dict[str, RouterMoments] = {
        name: moments_of(noise_logits(2, 8, sequences=4, seed=seed)) for seed, name in enumerate(PLANTED)
    }
    statistics_of(sources, **(own | description)).save(layout.router_stats)


def test_select_uses_the_domain_by_default_and_says_what_it_found(micro_config, micro_model, tmp_path, caplog):
    layout = RunLayout(tmp_path / "run")
    write_statistics(layout, micro_model)
    with caplog.at_level("INFO", "nexus_ray"):
        selection = select(micro_config(layout.directory), layout)
    assert selection.summary() in caplog.text
    assert selection.sources == ("play",)
    assert Selection.load(layout.selection) == selection
    chosen = micro_config(layout.directory, **{"select.sources": ["prose"]})
    assert select(chosen, layout).layers != selection.layers


def test_the_same_statistics_give_the_same_bytes(micro_config, micro_model, tmp_path):
    layout = RunLayout(tmp_path / "run")
    write_statistics(layout, micro_model)
    written = []
    for _ in range(2):
        select(micro_config(layout.directory), layout)
        written.append(layout.selection.read_bytes())
    assert written[0] == written[1]


@pytest.fixture(scope="module")
def copied_model(micro_model, tokenizer_directory, tmp_path_factory) -> Path:
    """The micro model with every layer's first expert in place of all the others, in MXFP4."""
    model = GptOssForCausalLM.from_pretrained(micro_model)
    for layer in model.model.layers:
        for values in layer.mlp.experts.parameters():
            values.data.copy_(values.data[:1].expand_as(values))
    path = tmp_path_factory.mktemp("models") / "copied"
    export_mxfp4(model, tokenizer_directory, path)
    return path


def test_select_finds_copied_experts_in_the_base_and_the_report_says_so(micro_config, copied_model, tmp_path):
    layout = RunLayout(tmp_path / "run")
    write_statistics(layout, copied_model)
    select(micro_config(layout.directory, **{"model.path": str(copied_model)}), layout)
    selection = Selection.load(layout.selection)
    assert [layer.cause for layer in selection.layers] == ["identical", "identical"]
    assert (selection.verdicts()[NOISE], selection.pooled_overlap_p_value, selection.expected_above_null) == (
        2,
        None,
        0,
    )
    assert "any choice gives the same shared expert" in render(selection, RouterStatistics.load(layout.router_stats))


def test_select_finds_no_copies_among_different_experts(micro_config, micro_model, tmp_path):
    layout = RunLayout(tmp_path / "run")
    write_statistics(layout, micro_model)
    causes = {layer.cause for layer in select(micro_config(layout.directory), layout).layers}
    assert "identical" not in causes


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"base_fingerprint": "another"}, "collected from another model"),
        ({"tokenizer_sha256": "another"}, "collected with another tokenizer"),
    ],
)
def test_statistics_of_another_origin_are_refused(micro_config, micro_model, tmp_path, description, message):
    layout = RunLayout(tmp_path / "run")
    write_statistics(layout, micro_model, **description)
    with pytest.raises(ArtefactError, match=message):
        select(micro_config(layout.directory), layout)
    assert not layout.selection.exists()


def test_selection_file_holds_everything(planted, tmp_path):
    selection = selected_from(planted, "play", top_k=4, max_correlation=0.5)
    selection.save(tmp_path / "selection.json")
    assert Selection.load(tmp_path / "selection.json") == selection
    assert Counter(selection.verdicts()) == Counter(layer.verdict for layer in selection.layers)


def test_a_damaged_selection_is_refused(tmp_path):
    path = tmp_path / "selection.json"
    with pytest.raises(ArtefactError, match="no expert selection"):
        Selection.load(path)
    path.write_text('{"layers": 3}')
    with pytest.raises(ArtefactError, match="not an expert selection"):
        Selection.load(path)
    path.write_text('{"format_version": 3, "layers": []}')
    with pytest.raises(ArtefactError, match="has format 3, not 4"):
        Selection.load(path)
