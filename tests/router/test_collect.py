"""Collecting statistics with the micro model: against a direct pass, in parts, interrupted, on several workers."""

from itertools import islice

import numpy as np
import pytest
import torch
from transformers import GptOssForCausalLM

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.data.packing import pack_shard
from nexus_ray.data.sources import list_shards
from nexus_ray.errors import DataError
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import load_base
from nexus_ray.router import collect as collect_module
from nexus_ray.router.artefact import RouterStatistics
from nexus_ray.router.collect import ShardCollector, collect, plan_work
from nexus_ray.storage import sha256_file


@pytest.fixture
def in_process(monkeypatch):
    """Run the worker here instead of on Ray, last item first; returns the rows it was called with."""
    calls = []

    def run(worker, arguments, items, resources, description):
        instance = worker(**arguments) if items else None
        for row in reversed(items):
            calls.append(row)
            yield instance(row)

    monkeypatch.setattr(collect_module, "map_over_pool", run)
    return calls


def digests(layout: RunLayout) -> tuple[str, str]:
    return sha256_file(layout.router_stats), sha256_file(layout.router_stats.with_suffix(".json"))


def reference_probabilities(config, source: str) -> np.ndarray:
    """[tokens, layers, experts] float64 of the sequences that collect should read, one sequence at a time."""
    base = load_base(config.model)
    tokens = []
    for item in plan_work(config):
        if item.shard.source == source:
            packed = pack_shard(item.shard, base.tokenizer, config.data.sequence_length)
            for sequence in islice(packed, item.sequences):
                ids = torch.from_numpy(sequence.input_ids[: sequence.num_tokens]).long()[None]
                with torch.no_grad():
                    output = base.model(input_ids=ids, output_router_logits=True)
                logits = torch.stack([layer.view(len(ids[0]), -1) for layer in output.router_logits], dim=1)
                tokens.append(logits.double().softmax(dim=-1).numpy())
    return np.concatenate(tokens)


def test_statistics_equal_a_direct_pass_through_transformers(micro_config, tmp_path, in_process):
    config = micro_config(tmp_path / "run")
    sources = collect(config, RunLayout(config.run.directory))
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
    tokenizer = load_base(config.model).tokenizer
    sums = np.zeros((2, 2, 8))
    seen: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(stock.model.layers):
        block.mlp.register_forward_hook(lambda _m, inputs, _o, layer=layer: seen.update({layer: inputs[0][0]}))
    for item in plan_work(config):
        if item.shard.source == source:
            for sequence in islice(pack_shard(item.shard, tokenizer, config.data.sequence_length), item.sequences):
                stock(input_ids=torch.from_numpy(sequence.input_ids[: sequence.num_tokens]).long()[None])
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
    config = micro_config(tmp_path / "run", **{"model.dtype": "float32", "collect.tokens_per_source": 1024})
    sources = collect(config, RunLayout(config.run.directory))
    expected = reference_saliency(config, "play")
    np.testing.assert_allclose(sources["play"].both_halves().saliency()[0], expected, rtol=2e-3)
    assert expected.max() > 1.3 * expected.min()


def test_dequantised_experts_give_statistics_without_reap(micro_config, tmp_path, in_process):
    config = micro_config(tmp_path / "run", **{"model.experts": "grouped_mm"})
    sources = collect(config, RunLayout(config.run.directory))
    loaded = RouterStatistics.load(RunLayout(config.run.directory).router_stats).sources
    for name, moments in sources.items():
        assert moments.tokens > 0
        assert not moments.has_reap
        assert not loaded[name].has_reap


def test_the_artefact_describes_itself(micro_config, micro_model, tmp_path, in_process):
    config = micro_config(tmp_path / "run")
    layout = RunLayout(config.run.directory)
    sources = collect(config, layout)
    description = RouterStatistics.load(layout.router_stats).description
    assert description.base_fingerprint == fingerprint(micro_model)
    assert (description.layers, description.experts, description.experts_per_token) == (2, 8, 2)
    assert description.tokens == {name: moments.tokens for name, moments in sources.items()}
    assert [path.name for path in layout.directory.iterdir() if "partial" in path.name] == []


def test_work_is_spread_evenly_and_bounded(micro_config, tmp_path):
    config = micro_config(tmp_path / "run", **{"collect.tokens_per_source": 1000})  # 16 sequences of 64
    shards = list_shards(config.data, "train")
    work = plan_work(config)
    for source in config.data.sources:
        mine = [item for item in work if item.shard.source == source]
        assert {item.sequences for item in mine} == {-(-16 // len(mine))}
        assert len(mine) == sum(shard.source == source for shard in shards) > 1


def test_more_shards_than_sequences_are_sampled_at_even_distances(micro_config, tmp_path):
    config = micro_config(tmp_path / "run", **{"collect.tokens_per_source": 128, "data.shard_bytes": 1024})
    play = [shard for shard in list_shards(config.data, "train") if shard.source == "play"]
    chosen = [item for item in plan_work(config) if item.shard.source == "play"]
    assert [item.shard for item in chosen] == [play[0], play[len(play) // 2]]
    assert [item.sequences for item in chosen] == [1, 1]


def test_both_halves_get_text_even_from_one_sequence_shards(micro_config, tmp_path, in_process):
    config = micro_config(tmp_path / "run", **{"collect.tokens_per_source": 64 * 4, "data.shard_bytes": 2048})
    assert {item.sequences for item in plan_work(config)} == {1}
    for moments in collect(config, RunLayout(config.run.directory)).values():
        assert (moments.count > 0).all()


def test_an_interrupted_job_continues_and_ends_with_the_same_bytes(micro_config, tmp_path, in_process, monkeypatch):
    config, whole = (micro_config(tmp_path / name) for name in ("interrupted", "whole"))
    layout = RunLayout(config.run.directory)
    work = plan_work(config)

    original = ShardCollector.__call__

    def fail_at_third(self, row):
        if len(in_process) == 3:
            raise KeyboardInterrupt
        return original(self, row)

    monkeypatch.setattr(ShardCollector, "__call__", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        collect(config, layout)
    assert not layout.router_stats.exists()
    done = {row["shard"]["index"] for row in in_process[:2]}
    in_process.clear()
    monkeypatch.setattr(ShardCollector, "__call__", original)

    collect(config, layout)
    assert {row["shard"]["index"] for row in in_process} == {item.shard.index for item in work} - done
    collect(whole, RunLayout(whole.run.directory))
    assert digests(layout) == digests(RunLayout(whole.run.directory))


def test_parts_of_another_recipe_are_not_used(micro_config, tmp_path, in_process, monkeypatch):
    layout = RunLayout(tmp_path / "run")
    monkeypatch.setattr(RouterStatistics, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        collect(micro_config(layout.directory), layout)
    monkeypatch.undo()
    in_process.clear()
    monkeypatch.setattr(collect_module, "map_over_pool", lambda *arguments: in_process.extend(arguments[2]) or [])
    changed = micro_config(layout.directory, **{"data.sequence_length": 32})
    with pytest.raises(Exception, match="no router statistics"):  # the parts that were not made
        collect(changed, layout)
    assert len(in_process) == len(plan_work(changed))


def test_broken_router_names_the_file(micro_config, tmp_path, in_process, monkeypatch):
    config = micro_config(tmp_path / "run")

    def broken_base(section):
        base = load_base(section)
        base.family.routers(base.model)[1].weight.data[0, 0] = float("nan")
        return base

    monkeypatch.setattr(collect_module, "load_base", broken_base)
    with pytest.raises(DataError, match=r"prose\.train\.jsonl, shard \d+, batch of sequences from 0: .* layer 1 "):
        collect(config, RunLayout(config.run.directory))


@pytest.mark.ray
def test_one_and_two_workers_give_the_same_bytes(micro_config, tmp_path, ray_session):
    layouts = []
    for workers in (1, 2):
        config = micro_config(tmp_path / f"workers{workers}", **{"resources.workers": workers})
        layouts.append(RunLayout(config.run.directory))
        collect(config, layouts[-1])
    assert digests(layouts[0]) == digests(layouts[1])
