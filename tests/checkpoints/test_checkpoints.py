"""Reading bases, identifying them, and overlays on disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import load_overlay, load_overlay_config
from nexus_ray.checkpoints.reader import CheckpointReader, read_model_config
from nexus_ray.errors import ArtefactError, ModelError
from nexus_ray.families import family_of
from nexus_ray.modeling.loading import activation, build_shared_experts


@pytest.fixture
def copy(micro_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro_model, tmp_path / "copy"))


def test_exported_model_loads_in_stock_transformers_with_no_key_left_over(micro_model: Path) -> None:
    _, info = GptOssForCausalLM.from_pretrained(micro_model, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_reader_slices_equal_whole_tensors(micro_model: Path) -> None:
    whole = load_file(micro_model / "model.safetensors")
    with CheckpointReader(micro_model) as reader:
        assert reader.names == sorted(whole)
        name = "model.layers.0.mlp.experts.down_proj_blocks"
        assert torch.equal(reader.read_slice(name, 5), whole[name][5])
        assert reader.shape(name) == list(whole[name].shape)
        with pytest.raises(ModelError, match="no tensor nonsense"):
            reader.read("nonsense")


@pytest.mark.parametrize("packed", [True, False])
def test_read_expert_is_what_transformers_dequantises(micro_model: Path, tmp_path: Path, packed: bool) -> None:
    stock = GptOssForCausalLM.from_pretrained(micro_model, dtype=torch.float32)
    path = micro_model
    if not packed:
        path = tmp_path / "plain"
        stock.config.quantization_config = None
        path.mkdir()
        save_file(
            {name: tensor.contiguous() for name, tensor in stock.state_dict().items()}, path / "model.safetensors"
        )
    experts = stock.model.layers[1].mlp.experts
    with CheckpointReader(path) as reader:
        weights = family_of(read_model_config(micro_model)).read_expert(reader, 1, 6)
    assert torch.equal(weights.gate_up[:64], experts.gate_up_proj[6].T[0::2])
    assert torch.equal(weights.gate_up[64:], experts.gate_up_proj[6].T[1::2])
    assert torch.equal(weights.down, experts.down_proj[6].T)
    assert torch.equal(weights.gate_up_bias[64:], experts.gate_up_proj_bias[6][1::2])


def test_fingerprint_is_that_of_the_content(micro_model: Path, copy: Path) -> None:
    assert fingerprint(copy) == fingerprint(micro_model)
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.router.weight"][0, 0] += 1
    save_file(tensors, copy / "model.safetensors")
    assert fingerprint(copy) != fingerprint(micro_model)


def test_fingerprint_sees_the_configuration(micro_model: Path, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"swiglu_limit": 5.0}))
    assert fingerprint(copy) != fingerprint(micro_model)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: shutil.rmtree(path), "no directory at"),
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "not JSON"),
        (lambda path: (path / "model.safetensors").unlink(), "neither"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 100), "damaged"),
        (
            lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-9]),
            "damaged",
        ),
    ],
    ids=["no directory", "no config", "bad config", "no weights", "garbage", "truncated"],
)
def test_broken_models_are_named(copy: Path, break_it, message: str) -> None:
    break_it(copy)
    with pytest.raises(ModelError, match=message):
        fingerprint(copy)


def test_unsupported_family_names_the_supported_ones() -> None:
    with pytest.raises(ModelError, match="'llama' is not supported; supported: gpt_oss"):
        family_of({"model_type": "llama"})


def test_index_naming_a_missing_shard(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    with safe_open(copy / "a.safetensors", "pt") as file:
        weight_map = dict.fromkeys(file.keys(), "a.safetensors")
    weight_map["lm_head.weight"] = "gone.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"gone\.safetensors is missing"):
        fingerprint(copy)


def test_parameter_count_is_that_of_the_modules(micro_model: Path, micro_overlay: Path) -> None:
    description = load_overlay_config(micro_overlay)
    config = read_model_config(micro_model)
    experts = build_shared_experts(description, activation(family_of(config), config))
    assert description.parameters == sum(parameter.numel() for parameter in experts.parameters())


def test_gpt_oss_parameter_counts_are_the_published_ones(micro_overlay: Path) -> None:
    description = load_overlay_config(micro_overlay).model_copy(
        update={"layers": 36, "hidden_size": 2880, "width": 2880, "token_gate": False}
    )
    scales = 36
    assert description.parameters - scales == 36 * 24_891_840


def test_damaged_overlay_is_an_error(micro_overlay: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(micro_overlay, tmp_path / "overlay"))
    identity = load_overlay_config(directory).base_fingerprint
    (directory / "overlay.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match="cannot be read"):
        load_overlay(directory, identity)
    (directory / "overlay_config.json").write_text("{}")
    with pytest.raises(ArtefactError, match="not an overlay description"):
        load_overlay_config(directory)
    with pytest.raises(ArtefactError, match="no overlay at"):
        load_overlay_config(tmp_path / "nowhere")
