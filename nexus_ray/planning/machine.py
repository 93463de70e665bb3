"""What this machine has: memory, GPUs and disk."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from nexus_ray.storage import Place, is_remote

_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_KIB = 1024


@dataclass(frozen=True)
class Machine:
    """One node.

    Attributes:
        memory: bytes of RAM that processes here may use in all.
        available: bytes that could be taken now without swapping; None where the system does not say.
        gpus: memory of each GPU, bytes.
        free_disk: bytes on the file system of the run directory; None of an object store.
    """

    memory: int
    available: int | None
    gpus: tuple[int, ...]
    free_disk: int | None


def this_machine(directory: Place) -> Machine:
    """Look at the machine, and at the disk that will hold `directory`, which need not exist."""
    gpus = tuple(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    memory, available = _memory()
    return Machine(memory, available, gpus, None if is_remote(directory) else _free_disk(directory))


def _free_disk(directory: Path) -> int:
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _memory() -> tuple[int, int | None]:
    """(total, available) bytes; a container's limit counts when it is lower."""
    fields = {}
    if _MEMINFO.exists():
        lines = (line.split() for line in _MEMINFO.read_text().splitlines())
        fields = {line[0].rstrip(":"): int(line[1]) * _KIB for line in lines}
    if "MemTotal" not in fields:
        fields["MemTotal"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min([fields["MemTotal"], *_container_limits()])
    available = fields.get("MemAvailable")
    return limit, None if available is None else min(available, limit)


def _container_limits() -> list[int]:
    texts = [path.read_text().strip() for path in _CGROUP_LIMITS if path.exists()]
    return [int(text) for text in texts if text.isdigit()]
