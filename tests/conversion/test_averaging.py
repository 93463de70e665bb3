"""The streamed mean of experts against transformers' dequantised weights, in both storage forms."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, GptOssForCausalLM

from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.conversion import averaging
from nexus_ray.conversion.averaging import mean_expert
from nexus_ray.errors import ModelError
from nexus_ray.families import FAMILIES, ExpertWeights

EXPERTS = [0, 4, 7]


def stock_mean(stock, experts: list[int]) -> tuple[Tensor, ...]:
    """Mean by plain float32 arithmetic on a stock transformers module, in the layout of `ExpertWeights`."""
    gate_up = stock.gate_up_proj[experts].float().mean(0).T
    bias = stock.gate_up_proj_bias[experts].float().mean(0)
    return (
        torch.cat([gate_up[0::2], gate_up[1::2]]),
        torch.cat([bias[0::2], bias[1::2]]),
        stock.down_proj[experts].float().mean(0).T,
        stock.down_proj_bias[experts].float().mean(0),
    )


def our_mean(directory: Path, layer: int, experts: list[int]) -> ExpertWeights:
    with CheckpointReader(directory) as reader:
        return mean_expert(FAMILIES["gpt_oss"].expert_parts(reader, layer), experts)


def assert_same_bfloat16(ours: ExpertWeights, reference: tuple[Tensor, ...]) -> None:
    for left, right in zip((ours.gate_up, ours.gate_up_bias, ours.down, ours.down_bias), reference, strict=True):
        assert torch.equal(left.bfloat16(), right.detach().bfloat16())


@pytest.mark.parametrize("rows", [3, 50, 256])  # chunks that divide nothing evenly, and one chunk
@pytest.mark.parametrize("experts", [[5], EXPERTS, list(range(8))])
def test_mean_of_packed_experts_equals_transformers(micro_model, monkeypatch, rows, experts):
    monkeypatch.setattr(averaging, "_ROWS", rows)
    stock = GptOssForCausalLM.from_pretrained(micro_model, dtype=torch.float32).model.layers[1].mlp.experts
    assert_same_bfloat16(our_mean(micro_model, 1, experts), stock_mean(stock, experts))


def test_mean_of_plain_bfloat16_experts_equals_transformers(micro_model, tmp_path):
    config = AutoConfig.from_pretrained(micro_model)
    del config.quantization_config
    torch.manual_seed(3)
    stock = GptOssForCausalLM(config).bfloat16()
    stock.save_pretrained(tmp_path)
    assert_same_bfloat16(our_mean(tmp_path, 0, EXPERTS), stock_mean(stock.model.layers[0].mlp.experts, EXPERTS))


def test_a_nan_scale_of_an_averaged_expert_is_refused_and_of_another_not_read(micro_model, tmp_path):
    name = "model.layers.1.mlp.experts.down_proj_scales"
    damaged = bytearray((micro_model / "model.safetensors").read_bytes())
    with CheckpointReader(micro_model) as reader:
        entry = reader.entry(name)
    size = (entry.stop - entry.start) // entry.shape[0]
    damaged[entry.start + 4 * size + 5] = 255
    (tmp_path / "model.safetensors").write_bytes(damaged)
    our_mean(tmp_path, 1, [0, 7])
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.down_proj_blocks holds NaN .* experts 0, 4, 7"):
        our_mean(tmp_path, 1, EXPERTS)


def test_the_number_of_torch_threads_is_left_as_it_was(micro_model):
    torch.set_num_threads(2)
    try:
        our_mean(micro_model, 0, EXPERTS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
