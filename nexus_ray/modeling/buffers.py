"""Fresh memory for large results.

A page is cleared by the kernel when it is first touched, and with pages of 4 KiB that takes longer than unpacking
weights into them does. Large CPU buffers therefore ask for huge pages (madvise(2), MADV_HUGEPAGE).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

_LARGE = 32 << 20  # bytes; the C library never reuses freed blocks above this size either


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised tensor, like `torch.empty`."""
    size = prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
