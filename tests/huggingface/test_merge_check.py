"""merge-check passes sound exports and names what is wrong with others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer

from nexus_ray.checkpoints.overlay import load_overlay, load_overlay_config, save_overlay
from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.cli import run_command
from nexus_ray.errors import ArtefactError, ModelError
from nexus_ray.huggingface.export import export
from nexus_ray.huggingface.merge_check import MergeReport, check_model, describe, merge_check, summary
from nexus_ray.huggingface.modeling import NexusGptOssForCausalLM
from nexus_ray.modeling.packed_experts import PackedExperts
from nexus_ray.storage import sha256_file

SHARD = "model-shared-experts.safetensors"


@pytest.fixture
def model(exported: Path) -> NexusGptOssForCausalLM:
    return AutoModelForCausalLM.from_pretrained(exported, experts_memory="packed")


@pytest.fixture
def damaged(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "damaged"))


def _check(model: NexusGptOssForCausalLM, exported: Path) -> MergeReport:
    with CheckpointReader(exported) as reader:
        return check_model(model, [name for name in reader.names if "shared_expert" in name], reader.read)


def test_a_sound_export_passes(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name: sha256_file(file) for file in exported.iterdir()}
    report = merge_check(exported)
    assert report.problems == []
    assert [check.name for check in report.tensors] == sorted(load_file(exported / SHARD))
    assert all(check.same and check.gradient > 0 for check in report.tensors)
    assert report.change > 0.1
    assert run_command(["merge-check", str(exported)]) == 0
    assert "ok: all 14 shared tensors" in capsys.readouterr().out
    assert {file.name: sha256_file(file) for file in exported.iterdir()} == before


def test_the_model_is_as_before(model: NexusGptOssForCausalLM, exported: Path) -> None:
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.model.layers[0].shared_expert.requires_grad_(False)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    _check(model, exported)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_that_ignores_its_shared_expert_is_named(model: NexusGptOssForCausalLM, exported: Path) -> None:
    layer = model.model.layers[1]
    layer.__class__ = GptOssDecoderLayer  # as a loading path would do that rebuilds the layer
    report = _check(model, exported)
    with pytest.raises(ArtefactError) as caught:
        report.require_sound()
    for name in model.shared_tensors():
        assert (f"{name} does nothing" in str(caught.value)) == name.startswith("model.layers.1."), name
    assert "[bold red]0.0e+00" in str(list(describe(report).columns[1].cells))


def test_a_tensor_without_effect_is_named(model: NexusGptOssForCausalLM, exported: Path) -> None:
    expert = model.model.layers[0].shared_expert
    gate = expert.token_gate
    expert.token_gate = None  # the computation forgets the gate, the parameters stay known
    expert.register_module("forgotten", gate)
    broken = {check.name for check in _check(model, exported).tensors if check.problem}
    assert broken == {
        f"model.layers.0.shared_expert.{kind}.{parameter}"
        for kind in ("token_gate", "forgotten")
        for parameter in ("weight", "bias")
    }


def test_experts_that_are_never_added_do_not_change_the_logits(model: NexusGptOssForCausalLM, exported: Path) -> None:
    for layer in model.model.layers:
        layer.__class__ = GptOssDecoderLayer
    report = _check(model, exported)
    assert report.change == 0
    assert "switching the shared experts off does not change the logits" in report.problems


def test_a_loaded_tensor_that_is_not_the_files_is_named(model: NexusGptOssForCausalLM, exported: Path) -> None:
    with torch.no_grad():
        model.model.layers[1].shared_expert.down_proj.bias[3] += 1
    assert _check(model, exported).problems == [
        "model.layers.1.shared_expert.down_proj.bias is not what the file holds"
    ]


def test_logits_that_are_not_finite_are_a_problem(model: NexusGptOssForCausalLM, exported: Path) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    assert "the logits are not finite" in _check(model, exported).problems


def test_a_zero_initialised_overlay_passes_and_is_called_so(
    micro_model: Path, micro_overlay: Path, tmp_path: Path
) -> None:
    description, tensors = load_overlay(micro_overlay, load_overlay_config(micro_overlay).base_fingerprint)
    zeroed = {name: tensor.zero_() if "down_proj" in name else tensor for name, tensor in tensors.items()}
    save_overlay(tmp_path / "zero", description, zeroed)
    report = merge_check(export(micro_model, tmp_path / "zero", tmp_path / "export").directory)
    assert report.problems == []
    assert report.change == 0
    assert "zero-initialised" in summary(report)


def test_a_shard_that_was_changed_is_refused(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(damaged / SHARD)
    tensors["model.layers.0.shared_expert.gate_up_proj.bias"][5] += 1e-3
    save_file(tensors, damaged / SHARD, metadata={"format": "pt"})
    assert run_command(["merge-check", str(damaged)]) == 1
    assert "are not those of the overlay" in " ".join(capsys.readouterr().err.split())


def test_an_index_that_leaves_a_shared_tensor_out_is_refused(damaged: Path) -> None:
    index = json.loads((damaged / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.0.shared_expert.scale"]
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtefactError, match="are not those of the overlay"):
        merge_check(damaged)


def test_a_missing_base_tensor_is_named(damaged: Path) -> None:
    tensors = load_file(damaged / "model-base.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, damaged / "model-base.safetensors", metadata={"format": "pt"})
    index = json.loads((damaged / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"missing_keys model\.norm\.weight"):
        merge_check(damaged)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no directory"):
        merge_check(tmp_path / "nowhere")


def test_a_base_is_not_an_export(micro_model: Path) -> None:
    with pytest.raises(ModelError, match="is not an export: its model_type is 'gpt_oss'"):
        merge_check(micro_model)


def test_experts_stay_packed_in_the_check(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = PackedExperts.forward
    monkeypatch.setattr(PackedExperts, "forward", lambda self, *inputs: seen.append(1) or forward(self, *inputs))
    merge_check(exported)
    assert len(seen) == 6  # two layers; with shared experts, without, and for the gradients
