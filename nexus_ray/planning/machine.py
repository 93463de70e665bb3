"""What a run is planned for: this machine, or nodes of a cluster by name."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nexus_ray.config import PlanSection
from nexus_ray.planning.hardware import Cluster, Gpu, kind_of_device, parse_hardware
from nexus_ray.storage import Place, is_remote

_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_KIB, _GIB = 1024, 1 << 30
HERE = "this machine"


@dataclass(frozen=True)
class Machine:
    """One node, or one of several that are alike.

    Attributes:
        memory: bytes of RAM that processes of a node may use in all.
        available: bytes that could be taken now without swapping; None where the system does not say.
        gpus: memory of each GPU of a node, bytes.
        free_disk: bytes on the file system of the run directory; None where that is somewhere else.
        nodes: how many there are.
        name: for people.
        gpu: kind of the GPUs, as `hardware.GPUS` calls it; None where there are none, or unknown ones.
    """

    memory: int
    available: int | None
    gpus: tuple[int, ...]
    free_disk: int | None
    nodes: int = 1
    name: str = HERE
    gpu: str | None = None

    @property
    def total_gpus(self) -> int:
        """Of all nodes."""
        return self.nodes * len(self.gpus)


def planned_machine(section: PlanSection, directory: Place) -> Machine:
    """What `plan.hardware` names, or this machine; `plan.gpu_memory_gib` replaces what its GPUs have.

    Raises:
        ConfigError: there is no such hardware.
    """
    machine = this_machine(directory) if section.hardware is None else cluster_machine(parse_hardware(section.hardware))
    if section.gpu_memory_gib is None:
        return machine
    memory = int(section.gpu_memory_gib * _GIB)
    return replace(machine, gpus=(memory,) * max(1, len(machine.gpus)))


def cluster_machine(cluster: Cluster) -> Machine:
    """A node of a cluster whose run directory is on shared storage."""
    memory = int(cluster.gpu.memory)
    return Machine(
        memory=cluster.gpu.node_memory,
        available=None,
        gpus=(memory,) * cluster.per_node,
        free_disk=None,
        nodes=cluster.nodes,
        name=cluster.name,
        gpu=cluster.gpu.name,
    )


def this_machine(directory: Place) -> Machine:
    """Look at the machine, and at the disk that will hold `directory`, which need not exist."""
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    kinds: list[Gpu | None] = [kind_of_device(device.name) for device in devices]
    memory, available = _memory()
    return Machine(
        memory,
        available,
        tuple(device.total_memory for device in devices),
        None if is_remote(directory) else _free_disk(directory),
        gpu=kinds[0].name if kinds and kinds[0] else None,
    )


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
