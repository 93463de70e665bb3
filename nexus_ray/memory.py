"""Memory that torch does not manage well by itself: fresh large buffers, and what CPU kernels keep."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_LARGE = 32 << 20  # bytes; the C library never reuses freed blocks above this size either
_SHAPE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # of oneDNN, and of torch's binding to it
_SHAPES_KEPT = 64


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised tensor, like `torch.empty`; a large one on a CPU asks for huge pages (madvise(2)).

    The kernel clears a page when it is first touched. With pages of 4 KiB that takes longer than unpacking weights
    into them.
    """
    size = prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))


def bound_shape_caches() -> None:
    """Let CPU matrix products keep compiled code and buffers for 64 shapes; call it before the first product.

    oneDNN and torch's binding to it keep 1024 each, and the number of tokens that an expert gets makes nearly every
    product's shape new: a training worker of the demo grew by 1 GB in ten steps, and is no faster for it. Variables
    that the user has set stay as they are.
    """
    for variable in _SHAPE_CACHES:
        os.environ.setdefault(variable, str(_SHAPES_KEPT))


def used_bytes(device: torch.device) -> int:
    """Memory in use: the most that tensors have taken on a GPU; else this process's own, mapped files aside."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError), Path("/proc/self/status").open(encoding="ascii") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
