"""Files for the tests of checkpoints: every element type, in memory or on disk, counted reads and full disks."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_ray.checkpoints.byte_files import LocalFile
from nexus_ray.checkpoints.header import DTYPES


def tensors_of_every_type() -> dict[str, Tensor]:
    """One tensor a dtype that the safetensors library knows by torch name, a scalar, an empty one, odd names."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, dtype in DTYPES.items():
        if name != "F8_E8M0":  # torch has it, the library's torch table does not
            content = torch.randint(0, 2 if dtype is torch.bool else 120, (3, 2, 8), generator=generator)
            tensors[f"layer.{name}"] = content.to(torch.uint8).repeat(1, 1, dtype.itemsize).view(dtype).contiguous()
    odd = {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), 'ü "quoted" \\ \n': torch.arange(3)}
    return tensors | odd


def with_header(values: Any, data: bytes = b"") -> bytes:
    """The bytes of a file whose header is `values` (JSON text as it is, anything else serialised)."""
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text + data


class MemoryFile:
    """A ByteFile on bytes in memory."""

    def __init__(self, content: bytes) -> None:
        self.location = "memory.safetensors"
        self.size = len(content)
        self._content = content

    def read(self, start: int, stop: int) -> Tensor:
        assert 0 <= start <= stop <= self.size, "read outside the file"
        return torch.frombuffer(bytearray(self._content[start:stop] or b"\0"), dtype=torch.uint8)[: stop - start]

    def close(self) -> None:
        pass


class CountingFile(LocalFile):
    """A local file that keeps a list of the byte ranges that were read."""

    def __init__(self, location: Path, ranges: list[tuple[int, int]]) -> None:
        super().__init__(location)
        self.ranges = ranges

    def read(self, start: int, stop: int) -> Tensor:
        self.ranges.append((start, stop))
        return super().read(start, stop)


class FullDisk:
    """os.pwrite on a disk that takes so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._pwrite = os.pwrite

    def __call__(self, descriptor: int, content: memoryview, offset: int) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = content[: min(self.room, 100)]  # short writes are allowed to happen
        self.room -= len(part)
        return self._pwrite(descriptor, part, offset)
