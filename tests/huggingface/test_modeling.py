"""The exported model computes what base + overlay compute, on every way of loading it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from transformers import AutoModelForCausalLM, GptOssForCausalLM, Mxfp4Config

from nexus_ray.checkpoints.overlay import load_overlay, load_overlay_config, save_overlay
from nexus_ray.config import ModelSection
from nexus_ray.huggingface.configuration import NexusGptOssConfig
from nexus_ray.huggingface.export import export
from nexus_ray.huggingface.modeling import NexusGptOssForCausalLM
from nexus_ray.modeling.loading import load_student
from nexus_ray.modeling.packed_experts import PackedExperts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PATHS = [{"experts_memory": "dequantised"}, {"experts_memory": "packed"}]


def load(directory: Path, dtype: str = "float32", **settings: Any) -> NexusGptOssForCausalLM:
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPES[dtype], attn_implementation="eager", output_loading_info=True, **settings
    )
    assert not any(info.values()), info
    assert type(model) is NexusGptOssForCausalLM
    return model


@torch.no_grad()
def logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture(scope="module")
def dequantised(exported: Path) -> NexusGptOssForCausalLM:
    return load(exported, experts_implementation="eager")


@pytest.fixture(scope="module")
def packed(exported: Path) -> NexusGptOssForCausalLM:
    return load(exported, experts_memory="packed")


@pytest.fixture(params=["dequantised", "packed"])
def model(request: pytest.FixtureRequest) -> NexusGptOssForCausalLM:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("experts", ["packed", "eager", "grouped_mm"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_logits_equal_base_with_overlay_bit_for_bit(
    micro_model: Path, micro_overlay: Path, input_ids: torch.Tensor, tmp_path: Path, stored, experts, dtype
) -> None:
    description, tensors = load_overlay(micro_overlay, load_overlay_config(micro_overlay).base_fingerprint)
    save_overlay(tmp_path / "overlay", description.model_copy(update={"dtype": stored}), tensors)
    student = load_student(ModelSection(path=micro_model, dtype=dtype, experts=experts), tmp_path / "overlay")
    directory = export(micro_model, tmp_path / "overlay", tmp_path / "export").directory
    how = {"experts_memory": "packed"} if experts == "packed" else {"experts_implementation": experts}
    assert torch.equal(logits(load(directory, dtype, **how), input_ids), logits(student.model, input_ids))


def test_packed_equals_dequantised(dequantised, packed, input_ids: torch.Tensor) -> None:
    assert torch.allclose(logits(packed, input_ids), logits(dequantised, input_ids), atol=1e-4)


def test_packed_weights_stay_as_they_are_stored(exported: Path) -> None:
    model = load(exported, "bfloat16", experts_memory="packed")
    for layer in model.model.layers:
        assert isinstance(layer.mlp.experts, PackedExperts)
        assert layer.mlp.experts.gate_up_proj_blocks.dtype == torch.uint8
        assert layer.mlp.experts.down_proj_scales.dtype == torch.uint8
        assert layer.shared_expert.scale.dtype == torch.float32
        assert layer.shared_expert.down_proj.weight.dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16


def test_default_path_is_transformers_own(exported: Path, input_ids: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.dtype == torch.bfloat16
    assert not isinstance(model.model.layers[0].mlp.experts, PackedExperts)
    explicit = load(exported, "bfloat16", quantization_config=Mxfp4Config(dequantize=True))
    assert torch.equal(logits(model, input_ids), logits(explicit, input_ids))


def test_switched_off_equals_stock_base_bit_for_bit(micro_model: Path, dequantised, input_ids: torch.Tensor) -> None:
    stock = GptOssForCausalLM.from_pretrained(
        micro_model, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    with dequantised.shared_experts_off():
        assert torch.equal(logits(dequantised, input_ids), logits(stock, input_ids))
    assert not torch.equal(logits(dequantised, input_ids), logits(stock, input_ids))


def test_generate_takes_the_likeliest_token_each_time(model, input_ids: torch.Tensor) -> None:
    prompt = input_ids[:1, :10]
    expected = prompt
    for _ in range(6):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(dim=-1)], dim=1)
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, eos_token_id=-1
    )
    assert torch.equal(found, expected)


def _gradients(model: NexusGptOssForCausalLM, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_gradients_of_the_packed_path_are_those_of_the_dequantised(dequantised, packed, input_ids) -> None:
    expected, found = _gradients(dequantised, input_ids), _gradients(packed, input_ids)
    assert set(found) == {name for name in expected if ".mlp.experts." not in name}
    assert packed.shared_tensors().keys() <= found.keys()
    assert len(packed.shared_tensors()) == 14
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_gradient_checkpointing_changes_no_gradient(model, input_ids: torch.Tensor) -> None:
    expected = _gradients(model, input_ids)
    model.gradient_checkpointing_enable()
    model.train()
    try:
        found = _gradients(model, input_ids)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in found)


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize("again", PATHS)
def test_save_pretrained_round_trips(exported: Path, input_ids, tmp_path: Path, how, again) -> None:
    model = load(exported, **how)
    expected = logits(model, input_ids)
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == "nexus_gpt_oss"
    assert config["shared_experts"]["width"] == 64
    assert ("quantization_config" in config) == (how["experts_memory"] == "packed")
    assert "experts_memory" not in config
    reloaded = load(tmp_path / "saved", **again)
    if how == again:
        assert torch.equal(logits(reloaded, input_ids), expected)
    assert torch.allclose(logits(reloaded, input_ids), expected, atol=1e-4)


def test_a_deep_copy_has_shared_experts_of_its_own(model, input_ids: torch.Tensor) -> None:
    before = logits(model, input_ids)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, input_ids), before)
    with torch.no_grad():
        twin.model.layers[1].shared_expert.scale.zero_()
    assert not torch.equal(logits(twin, input_ids), before)
    assert torch.equal(logits(model, input_ids), before)


def test_a_compiled_model_follows_the_switch(exported: Path, input_ids: torch.Tensor) -> None:
    model = load(exported, experts_implementation="grouped_mm")
    on = logits(model, input_ids)
    with model.shared_experts_off():
        off = logits(model, input_ids)
    torch._dynamo.reset()
    assert torch.equal(logits(torch.compile(model, backend="eager", fullgraph=True), input_ids), on)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits(compiled, input_ids), on)
    with model.shared_experts_off():
        assert torch.equal(logits(compiled, input_ids), off)
    assert torch.equal(logits(compiled, input_ids), on)


def test_the_decoder_alone_has_the_shared_experts_too(model, input_ids: torch.Tensor) -> None:
    with torch.no_grad():
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        assert torch.equal(model.lm_head(hidden), logits(model, input_ids))


def test_a_device_map_never_splits_a_layer(packed: NexusGptOssForCausalLM) -> None:
    size = sum(parameter.nbytes for parameter in packed.parameters())
    used = set()
    for share in range(1, 20):
        found = infer_auto_device_map(packed, {"cpu": size * share // 20, "disk": size}, packed._no_split_modules)
        assert not [name for name in found if name.startswith("model.layers.") and name.count(".") > 2]
        used.add(frozenset(found.values()))
    assert {"cpu", "disk"} in used, "no split was tried"


@pytest.fixture(scope="module")
def plain_base(micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro model with unpacked bfloat16 experts, in several shards."""
    stock = GptOssForCausalLM.from_pretrained(
        micro_model, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    directory = tmp_path_factory.mktemp("plain") / "base"
    stock.save_pretrained(directory, max_shard_size="1MB", save_original_format=False)
    assert len(list(directory.glob("*.safetensors"))) > 1
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    return directory


@pytest.mark.parametrize("how", PATHS)
def test_a_base_that_is_not_quantised(
    plain_base: Path, micro_overlay: Path, dequantised, input_ids: torch.Tensor, tmp_path: Path, how, make_overlay_for
) -> None:
    directory = export(plain_base, make_overlay_for(plain_base), tmp_path / "export").directory
    model = load(directory, **how)
    assert isinstance(model.model.layers[0].mlp.experts, PackedExperts) == (how["experts_memory"] == "packed")
    assert torch.allclose(logits(model, input_ids), logits(dequantised, input_ids), atol=1e-4)


@pytest.fixture
def make_overlay_for(micro_overlay: Path, tmp_path: Path) -> Callable[[Path], Path]:
    """A function that gives the micro overlay for another base."""
    from nexus_ray.checkpoints.fingerprint import fingerprint

    def make(base: Path) -> Path:
        description, tensors = load_overlay(micro_overlay, load_overlay_config(micro_overlay).base_fingerprint)
        other = description.model_copy(update={"base_fingerprint": fingerprint(base)})
        save_overlay(tmp_path / "moved", other, tensors)
        return tmp_path / "moved"

    return make


def test_the_class_itself_loads_packed_too(exported: Path, packed, input_ids: torch.Tensor) -> None:
    model = NexusGptOssForCausalLM.from_pretrained(exported, experts_memory="packed", dtype=torch.float32)
    assert torch.equal(logits(model, input_ids), logits(packed, input_ids))


def test_a_configuration_without_shared_experts_is_refused(exported: Path) -> None:
    values = json.loads((exported / "config.json").read_text())
    for described in (None, {}, {"width": 64}):
        config = NexusGptOssConfig(**values | {"shared_experts": described})
        with torch.device("meta"), pytest.raises(ValueError, match="needs `width` and `token_gate`"):
            NexusGptOssForCausalLM(config)


def test_wrong_settings_are_refused(exported: Path) -> None:
    with pytest.raises(ValueError, match="experts_memory"):
        AutoModelForCausalLM.from_pretrained(exported, experts_memory="squeezed")
    with pytest.raises(ValueError, match="leave quantization_config out"):
        AutoModelForCausalLM.from_pretrained(
            exported, experts_memory="packed", quantization_config=Mxfp4Config(dequantize=True)
        )


def test_a_model_made_from_a_configuration_alone_computes(exported: Path, input_ids: torch.Tensor) -> None:
    config = NexusGptOssConfig.from_pretrained(exported)
    del config.quantization_config
    assert torch.isfinite(logits(AutoModelForCausalLM.from_config(config).eval(), input_ids)).all()
