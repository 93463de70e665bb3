"""Large fresh buffers are ordinary tensors."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from nexus_ray.modeling.memory import fresh

_ROWS, _COLUMNS = 3000, 4000


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (_ROWS, _COLUMNS)])
def test_shape_type_and_writing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = fresh(shape, dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (torch.Size(shape), dtype, True)
    assert (tensor.fill_(3) == 3).all()


def test_memory_lives_as_long_as_any_view(monkeypatch: pytest.MonkeyPatch) -> None:
    view = fresh((_ROWS, _COLUMNS), torch.float32).fill_(2.0)[7]
    gc.collect()
    other = fresh((_ROWS, _COLUMNS), torch.float32).fill_(5.0)
    assert (view == 2).all()
    assert (other == 5).all()


def test_systems_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert (fresh((_ROWS, _COLUMNS), torch.float32).fill_(1.0) == 1).all()


def test_another_device() -> None:
    assert fresh((_ROWS, _COLUMNS), torch.float32, "meta").is_meta
