"""Hidden states: bit for bit in bfloat16, as near as e4m3 allows in float8."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nexus_ray.targets.encoding.encodings import HiddenEncoding


def states(seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(9, 64, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_bfloat16_states_come_back_bit_for_bit(scale):
    encoding = HiddenEncoding(hidden_size=64)
    hidden = states(0, scale).bfloat16()
    hidden[0, :2] = torch.tensor([0.0, -0.0])
    columns = encoding.encode(hidden)
    assert {name: column.shape[-1] for name, column in columns.items()} == encoding.widths()
    found = encoding.decode(columns).hidden
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.view(torch.int16), hidden.view(torch.int16))


def test_the_columns_are_the_low_and_the_high_bytes_of_a_truncated_float32():
    """NumPy knows no bfloat16: it is the upper half of a float32."""
    hidden = states(1).bfloat16()
    halves = (hidden.float().numpy().view(np.uint32) >> 16).astype(np.uint16)
    columns = HiddenEncoding(hidden_size=64).encode(hidden)
    assert np.array_equal(columns["hidden_low"].numpy(), halves & 0xFF)
    assert np.array_equal(columns["hidden_high"].numpy(), halves >> 8)


def test_float32_states_are_rounded_to_the_nearest_bfloat16():
    hidden = states(2)
    found = HiddenEncoding(hidden_size=64).decode(HiddenEncoding(hidden_size=64).encode(hidden)).hidden
    assert torch.equal(found, hidden.bfloat16())


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_float8_states_are_within_the_precision_of_e4m3(scale):
    """Three bits of mantissa: half of 2^-3 of a value, and an absolute step near zero."""
    encoding = HiddenEncoding(hidden_size=64, dtype="float8")
    hidden = states(3, scale)
    columns = encoding.encode(hidden)
    assert {name: column.shape[-1] for name, column in columns.items()} == encoding.widths()
    found = encoding.decode(columns).hidden.double()
    smallest = hidden.abs().amax(-1, keepdim=True).double() / 448 * 2**-9
    allowed = torch.maximum(hidden.double().abs() / 16, smallest / 2)
    assert ((found - hidden.double()).abs() <= allowed * (1 + 1e-5)).all()
    assert torch.equal(found.abs().argmax(-1), hidden.abs().argmax(-1)), "the largest is exact: it is the scale"


def test_states_of_zero_stay_zero():
    for dtype in ("bfloat16", "float8"):
        encoding = HiddenEncoding(hidden_size=8, dtype=dtype)
        assert (encoding.decode(encoding.encode(torch.zeros(2, 8))).hidden == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_states_that_are_no_numbers_are_refused(dtype, value):
    hidden = states(4)
    hidden[3, 3] = value
    with pytest.raises(ValueError, match="hidden states are NaN or infinite"):
        HiddenEncoding(hidden_size=64, dtype=dtype).encode(hidden)
