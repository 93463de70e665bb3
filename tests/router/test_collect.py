"""Collecting statistics with the micro model: against a direct pass, in parts, interrupted, on several workers."""

import json

import numpy as np
import pytest
import torch
from transformers import GptOssForCausalLM

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.errors import DataError
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import load_base, load_student
from nexus_ray.router import collect as collect_module
from nexus_ray.router.artefact import RouterStatistics
from nexus_ray.router.calibration import Calibration, choose_calibration
from nexus_ray.router.collect import StatisticsCollector, collect, plan_units
from nexus_ray.storage import sha256_file


def digests(layout: RunLayout) -> tuple[str, ...]:
    """Of the statistics, the calibration text, and their descriptions."""
    arrays = (layout.router_stats, layout.calibration)
    return tuple(sha256_file(path) for file in arrays for path in (file, file.with_suffix(".json")))


def sequences_of(layout: RunLayout, source: str) -> list[torch.Tensor]:
    """[1, tokens] ids of the calibration sequences of a source, without padding."""
    text = Calibration.load(layout.calibration).sources[source]
    pairs = zip(text.input_ids, text.num_tokens, strict=True)
    return [torch.from_numpy(ids[:count]).long()[None] for ids, count in pairs]


def reference_probabilities(config, source: str) -> np.ndarray:
    """[tokens, layers, experts] float64 of the calibration text, one sequence at a time, by transformers."""
    base = load_base(config.model)
    tokens = []
    for ids in sequences_of(RunLayout(config.run.directory), source):
        with torch.no_grad():
            output = base.model(input_ids=ids, output_router_logits=True)
        logits = torch.stack([layer.view(len(ids[0]), -1) for layer in output.router_logits], dim=1)
        tokens.append(logits.double().softmax(dim=-1).numpy())
    return np.concatenate(tokens)


def test_statistics_equal_a_direct_pass_through_transformers(micro_config, tmp_path, in_process):
    config = micro_config(tmp_path / "run")
    sources = collect(config, RunLayout(config.run.directory)).sources
    assert set(sources) == {"play", "prose"}
    for name, moments in sources.items():
        probabilities = reference_probabilities(config, name)
        whole = moments.both_halves()
        assert whole.tokens == len(probabilities)
        for layer in range(2):
            expected = np.cov(probabilities[:, layer], rowvar=False)
            np.testing.assert_allclose(whole.covariance()[0, layer], expected, rtol=1e-3, atol=1e-7)


def reference_saliency(config, source: str) -> np.ndarray:
    """[layers, experts] mean of gate x output norm, by the model card on transformers' dequantised weights."""
    stock = GptOssForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval().requires_grad_(False)
    sums = np.zeros((2, 2, 8))
    seen: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(stock.model.layers):
        block.mlp.register_forward_hook(lambda _m, inputs, _o, layer=layer: seen.update({layer: inputs[0][0]}))
    for ids in sequences_of(RunLayout(config.run.directory), source):
        stock(input_ids=ids)
        for layer, hidden in seen.items():
            sums[:, layer] += _contributions(stock.model.layers[layer].mlp, hidden)
    return sums[0] / np.maximum(sums[1], 1)


def _contributions(mlp, hidden: torch.Tensor) -> np.ndarray:
    """[2, experts] sum of gate x output norm and count, over the tokens [tokens, hidden] that an expert gets."""
    top = (hidden @ mlp.router.weight.T + mlp.router.bias).topk(2)
    gates = top.values.softmax(dim=-1)
    result = np.zeros((2, 8))
    for expert in range(8):
        both = hidden @ mlp.experts.gate_up_proj[expert] + mlp.experts.gate_up_proj_bias[expert]
        gate, up = both[:, 0::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        norm = (inner @ mlp.experts.down_proj[expert] + mlp.experts.down_proj_bias[expert]).norm(dim=-1)
        chosen = top.indices == expert
        result[:, expert] = float((gates * chosen).sum(dim=-1) @ norm), int(chosen.sum())
    return result


def test_reap_equals_expert_outputs_computed_by_hand(micro_config, tmp_path, in_process):
    config = micro_config(tmp_path / "run", **{"model.dtype": "float32", "collect.tokens": 2048})
    sources = collect(config, RunLayout(config.run.directory)).sources
    expected = reference_saliency(config, "play")
    np.testing.assert_allclose(sources["play"].both_halves().saliency()[0], expected, rtol=2e-3)
    assert expected.max() > 1.3 * expected.min()


@pytest.mark.parametrize("override", [{"model.experts": "grouped_mm"}, {"collect.expert_norms": False}])
def test_without_output_norms_there_are_statistics_without_reap(override, micro_config, tmp_path, in_process):
    config = micro_config(tmp_path / "run", **override)
    sources = collect(config, RunLayout(config.run.directory)).sources
    loaded = RouterStatistics.load(RunLayout(config.run.directory).router_stats).sources
    for name, moments in sources.items():
        assert moments.tokens > 0
        assert not moments.has_reap
        assert not loaded[name].has_reap


def test_the_artefact_describes_itself(micro_config, micro_model, tmp_path, in_process):
    config = micro_config(tmp_path / "run")
    layout = RunLayout(config.run.directory)
    sources = collect(config, layout).sources
    description = RouterStatistics.load(layout.router_stats).description
    assert description.base_fingerprint == fingerprint(micro_model)
    assert (description.layers, description.experts, description.experts_per_token) == (2, 8, 2)
    assert description.tokens == {name: moments.tokens for name, moments in sources.items()}
    assert [path.name for path in layout.directory.iterdir() if "partial" in path.name] == []


def test_units_cover_every_sequence_once_and_hold_whole_batches(micro_config, tmp_path, in_process):
    config = micro_config(tmp_path / "run", **{"collect.batch_sequences": 3})
    calibration = choose_calibration(config, RunLayout(config.run.directory).calibration)
    units = plan_units(config, calibration)
    assert [unit.index for unit in units] == list(range(len(units)))
    for name, text in calibration.sources.items():
        mine = [unit for unit in units if unit.source == name]
        assert [row for unit in mine for row in range(unit.start, unit.stop)] == list(range(len(text)))
        assert all((unit.stop - unit.start) % 3 == 0 for unit in mine[:-1])
        assert len(mine) > 1


def test_the_student_is_observed_on_the_same_text(micro_config, micro_overlay, tmp_path, in_process):
    config = micro_config(tmp_path / "run", **{"model.dtype": "float32"})
    layout = RunLayout(config.run.directory)
    base = collect(config, layout)
    before = digests(layout)
    student = collect(config, layout, micro_overlay)
    assert digests(layout) == before, "the base's statistics stay as they are"
    loaded = RouterStatistics.load(layout.student_router_stats)
    assert loaded.description.calibration == base.description.calibration
    assert loaded.description.overlay_sha256 is not None
    expected = []
    model = load_student(config.model, micro_overlay)
    for ids in sequences_of(layout, "play"):
        with torch.no_grad():
            _, logits = model.forward(ids, torch.ones_like(ids, dtype=torch.bool))
        expected.append(logits[0].double().softmax(-1))
    mean = torch.cat(expected).mean(0).numpy()
    np.testing.assert_allclose(student.sources["play"].both_halves().mean[0], mean, rtol=1e-4)
    assert np.abs(base.sources["play"].both_halves().mean[0] - mean).max() > 1e-4


def test_exported_probabilities_are_those_of_the_first_tokens_of_each_source(micro_config, tmp_path, in_process):
    config = micro_config(tmp_path / "run", **{"model.dtype": "float32", "collect.export_probabilities": 901})
    layout = RunLayout(config.run.directory)
    collect(config, layout)
    with np.load(layout.router_probabilities, allow_pickle=False) as file:
        rows, metadata = file["router_probs"], json.loads(str(file["metadata"]))
    assert rows.dtype == np.float16
    assert rows.shape == (901, 2, 8)
    assert (metadata["num_tokens"], metadata["num_layers"], metadata["num_experts"]) == (901, 2, 8)
    expected = [reference_probabilities(config, "play")[:451], reference_probabilities(config, "prose")[:450]]
    np.testing.assert_allclose(rows, np.concatenate(expected), atol=1e-3)


def test_an_interrupted_job_continues_and_ends_with_the_same_bytes(micro_config, tmp_path, in_process, monkeypatch):
    config, whole = (micro_config(tmp_path / name) for name in ("interrupted", "whole"))
    layout = RunLayout(config.run.directory)
    units = plan_units(config, choose_calibration(config, layout.calibration))
    in_process.clear()
    original = StatisticsCollector.__call__

    def fail_at_third(self, row):
        if len(in_process) == 3:
            raise KeyboardInterrupt
        return original(self, row)

    monkeypatch.setattr(StatisticsCollector, "__call__", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        collect(config, layout)
    assert not layout.router_stats.exists()
    done = {row["index"] for row in in_process[:2]}
    in_process.clear()
    monkeypatch.setattr(StatisticsCollector, "__call__", original)

    collect(config, layout)
    assert {row["index"] for row in in_process} == {unit.index for unit in units} - done
    collect(whole, RunLayout(whole.run.directory))
    assert digests(layout) == digests(RunLayout(whole.run.directory))


def test_parts_of_another_recipe_are_not_used(micro_config, tmp_path, in_process, monkeypatch):
    layout = RunLayout(tmp_path / "run")
    monkeypatch.setattr(RouterStatistics, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        collect(micro_config(layout.directory), layout)
    in_process.clear()
    changed = micro_config(layout.directory, **{"collect.batch_sequences": 2})
    with pytest.raises(KeyboardInterrupt):
        collect(changed, layout)
    units = plan_units(changed, Calibration.load(layout.calibration))
    assert sorted(row["index"] for row in in_process) == [unit.index for unit in units]


def test_a_broken_router_names_layer_sequence_and_file(micro_config, tmp_path, in_process, monkeypatch):
    config = micro_config(tmp_path / "run")

    def broken_base(section):
        base = load_base(section)
        base.family.routers(base.model)[1].weight.data[0, 0] = float("nan")
        return base

    monkeypatch.setattr(collect_module, "load_base", broken_base)
    with pytest.raises(DataError, match=r"layer 1 are NaN or infinite in sequence \d+ of .*prose\.train\.jsonl"):
        collect(config, RunLayout(config.run.directory))


@pytest.mark.ray
def test_one_and_three_workers_give_the_same_bytes(micro_config, tmp_path, ray_session):
    found = set()
    for workers in (1, 3):
        config = micro_config(tmp_path / f"workers{workers}", **{"resources.workers": workers})
        layout = RunLayout(config.run.directory)
        collect(config, layout)
        found.add(digests(layout))
    assert len(found) == 1


@pytest.mark.ray
@pytest.mark.slow  # the pool that grows in test_autoscaling.py has its bytes compared too
def test_a_pool_that_grows_gives_the_same_bytes(micro_config, tmp_path, ray_session):
    found = set()
    for name, least in (("fixed", 2), ("growing", 1)):
        config = micro_config(tmp_path / name, **{"resources.workers": 2, "resources.min_workers": least})
        layout = RunLayout(config.run.directory)
        collect(config, layout)
        found.add(digests(layout))
    assert len(found) == 1
