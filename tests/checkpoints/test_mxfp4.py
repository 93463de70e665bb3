"""MXFP4 against transformers' own conversion and the rules of the OCP MX specification."""

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nexus_ray.checkpoints import mxfp4
from nexus_ray.checkpoints.mxfp4 import dequantise, quantise

_GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantise_equals_transformers_for_every_byte_and_finite_scale(dtype: torch.dtype) -> None:
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, 16).contiguous()
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(1, 255, 16, 16).contiguous()
    reference = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    assert torch.equal(dequantise(blocks, scales, dtype), reference)


def test_values_on_the_grid_survive_a_round_trip() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (50, 64), generator=generator)
    signs = torch.randint(0, 2, (50, 64), generator=generator) * 2.0 - 1
    weights = _GRID[codes] * signs
    weights[:, ::32] = 6.0  # fixes each block's shared exponent
    weights = weights * torch.exp2(torch.randint(-20, 20, (50, 1), generator=generator).float())
    assert torch.equal(dequantise(*quantise(weights)), weights)


def test_rounds_to_nearest_and_ties_to_even_code() -> None:
    block = torch.zeros(32)
    block[:9] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.2501])
    expected = [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 0.5]
    assert dequantise(*quantise(block)).tolist()[:9] == expected
    assert dequantise(*quantise(-block)).tolist()[:9] == [-value for value in expected]


def test_quantised_value_is_the_nearest_grid_point_or_saturated() -> None:
    weights = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    blocks, scales = quantise(weights)
    scale = torch.exp2(scales.float() - 127)
    grid = torch.cat([_GRID, -_GRID]) * scale.unsqueeze(-1)
    nearest = (weights.unsqueeze(-1) - grid).abs().amin(-1)
    error = (dequantise(blocks, scales) - weights).abs()
    assert torch.allclose(error, nearest)


def test_zero_block_stays_zero() -> None:
    assert not dequantise(*quantise(torch.zeros(2, 64))).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_into_a_given_buffer_whatever_it_held(dtype: torch.dtype) -> None:
    blocks, scales = quantise(torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)))
    out = torch.full((3, 5, 64), torch.nan, dtype=dtype)
    assert dequantise(blocks, scales, dtype, out).data_ptr() == out.data_ptr()
    assert torch.equal(out, convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2))


def test_more_values_than_one_lookup_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, scales = quantise(torch.randn(7, 96, generator=torch.Generator().manual_seed(2)))
    whole = dequantise(blocks, scales)
    monkeypatch.setattr(mxfp4, "_CHUNK", 5)
    assert torch.equal(dequantise(blocks, scales), whole)


def test_rows_of_a_larger_tensor_need_not_be_contiguous() -> None:
    blocks, scales = quantise(torch.randn(8, 64, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(dequantise(blocks[::2], scales[::2]), dequantise(blocks, scales)[::2])


def test_scale_byte_255_means_nan() -> None:
    blocks, scales = quantise(torch.ones(2, 64))
    scales[1, 0] = 255
    values = dequantise(blocks, scales)
    assert values[1, :32].isnan().all()
    assert not values[0].isnan().any()
    assert not values[1, 32:].isnan().any()
