"""Fresh buffers are ordinary tensors in huge pages; CPU kernels keep few shapes."""

from __future__ import annotations

import gc
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nexus_ray.memory import bound_shape_caches, fresh

_ROWS, _COLUMNS = 6000, 8000  # 46 MiB of bytes: large in every type


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (_ROWS, _COLUMNS)])
def test_shape_type_and_writing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = fresh(shape, dtype)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (torch.Size(shape), dtype, True)
    assert (tensor.fill_(3) == 3).all()


def test_large_buffers_ask_for_huge_pages() -> None:
    """`hg` among the kernel's flags of the mapping: madvise(MADV_HUGEPAGE) was called for it."""
    tensor = fresh((_ROWS, _COLUMNS), torch.uint8)
    flags = [line for line in _mapping_of(tensor) if line.startswith("VmFlags")]
    assert flags
    assert " hg" in flags[0]


def _mapping_of(tensor: torch.Tensor) -> list[str]:
    """Lines about the memory mapping that holds a tensor."""
    inside, lines = False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            start, stop = (int(end, 16) for end in line.split()[0].split("-"))
            inside = start <= tensor.data_ptr() < stop
        if inside:
            lines.append(line)
    return lines


def test_memory_lives_as_long_as_any_view() -> None:
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


_PRODUCTS = """
import torch
from nexus_ray.memory import bound_shape_caches
{call}
torch.set_num_threads(1)

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

weight = torch.randn(256, 192, dtype=torch.bfloat16)
torch.nn.functional.linear(torch.randn(7, 192).bfloat16(), weight)
before = anonymous()
for rows in range(8, 700):
    torch.nn.functional.linear(torch.randn(rows, 192).bfloat16(), weight)
print(anonymous() - before)
"""


def test_products_of_many_shapes_keep_little_memory() -> None:
    def growth(call: str) -> int:
        """KiB."""
        environment = {name: value for name, value in os.environ.items() if "CAPACITY" not in name}
        command = [sys.executable, "-c", _PRODUCTS.format(call=call)]
        return int(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)

    assert growth("bound_shape_caches()") < growth("") / 2


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    bound_shape_caches()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY") == "64"
