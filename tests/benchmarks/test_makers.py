"""The checkpoint makers: true names, shapes and sizes, files that stock transformers loads, an exact upcycling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mxfp4Config,
)

from nexus_ray.config import SelectSection
from nexus_ray.errors import ConfigError, StorageError
from nexus_ray.selection.selection import Selection, select_experts

Script = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def shapes(script: Script) -> ModuleType:
    return script("_true_shape")


@pytest.fixture(scope="module")
def maker(script: Script) -> ModuleType:
    return script("make_checkpoint")


@pytest.fixture
def micro_shape(shapes: ModuleType):
    sizes = {"hidden_size": 64, "intermediate_size": 32, "attention_heads": 2, "key_value_heads": 1, "head_dim": 32}
    return dataclasses.replace(shapes.SHAPES["gpt-oss-20b"], layers=2, experts=4, **sizes)


@pytest.mark.parametrize("shape", ["gpt-oss-20b", "gpt-oss-120b"])
def test_names_and_shapes_are_those_that_transformers_expects(shapes: ModuleType, shape: str) -> None:
    true = shapes.SHAPES[shape]
    with torch.device("meta"):
        model = GptOssForCausalLM(GptOssConfig(**true.config()))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {spec.name: spec.shape for spec in shapes.checkpoint_specs(true)}
    for name in [name for name in found if name.endswith("_blocks")]:
        experts, rows, groups, half = found.pop(name)
        assert found.pop(name.replace("_blocks", "_scales")) == (experts, rows, groups)
        found[name.removesuffix("_blocks")] = (
            experts,
            groups * half * 2,
            rows,
        )  # in memory the matrices are transposed
    assert found == expected


def test_the_sizes_are_the_published_ones(shapes: ModuleType) -> None:
    """`metadata.total_size` of the published model.safetensors.index.json, in bytes."""
    total = {name: shapes.filled_bytes(shapes.checkpoint_specs(shape), None) for name, shape in shapes.SHAPES.items()}
    assert total == {"gpt-oss-20b": 13_761_264_768, "gpt-oss-120b": 65_248_815_744}


def test_a_made_checkpoint_loads_in_stock_transformers(
    maker: ModuleType, micro_shape, tokenizer_directory: Path, tmp_path: Path
) -> None:
    result = maker.make_true_shape(tmp_path / "made", micro_shape, None, tokenizer_directory, seed=0)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "made", quantization_config=Mxfp4Config(dequantize=True), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    down = model.model.layers[0].mlp.experts.down_proj.float()
    assert down.std().item() == pytest.approx(0.02, rel=0.3)
    assert model(torch.arange(20)[None]).logits.isfinite().all()
    assert 0 <= result["disk_bytes"] - result["bytes"] < 1 << 13  # whole blocks of the file system


@pytest.fixture
def selection(script: Script, micro_shape) -> Selection:
    """Two experts of each layer."""
    statistics = script("convert_true_shape").synthetic_statistics(micro_shape)
    return select_experts(statistics, SelectSection(top_k=2), ("domain",))


def test_only_selected_experts_are_filled(
    maker: ModuleType, micro_shape, selection: Selection, tokenizer_directory: Path, tmp_path: Path
) -> None:
    selection.save(tmp_path / "selection.json")
    maker.make_true_shape(tmp_path / "made", micro_shape, tmp_path / "selection.json", tokenizer_directory, seed=0)
    with safe_open(tmp_path / "made" / "model.safetensors", "pt") as file:
        for layer, chosen in enumerate(selection.layers):
            blocks = file.get_tensor(f"model.layers.{layer}.mlp.experts.gate_up_proj_blocks")
            assert [index for index in range(4) if blocks[index].any()] == sorted(chosen.selected)


def test_a_selection_of_another_shape_is_refused(
    maker: ModuleType, micro_shape, selection: Selection, tokenizer_directory: Path, tmp_path: Path
) -> None:
    selection.save(tmp_path / "selection.json")
    larger = dataclasses.replace(micro_shape, experts=8)
    with pytest.raises(ConfigError, match="2 layers of 4 experts"):
        maker.make_true_shape(tmp_path / "made", larger, tmp_path / "selection.json", tokenizer_directory, seed=0)
    assert not (tmp_path / "made").exists()


def test_an_existing_output_is_kept(maker: ModuleType, micro_shape, tokenizer_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(StorageError, match="--overwrite"):
        maker.make_true_shape(tmp_path / "kept", micro_shape, None, tokenizer_directory, seed=0)
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize("limit", [7.0, 1e6])
def test_an_upcycled_dense_model_computes_the_same(script: Script, limit: float) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True, pad_token_id=0)).eval()
    for parameter in dense.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    moe = script("_smollm2").upcycle(dense, limit, seed=0)
    ids = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        assert (dense(ids).logits - moe(ids).logits).abs().max() < 1e-4
