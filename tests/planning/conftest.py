"""Fixtures of the planning tests: machines that do not exist, and what autograd really keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from nexus_ray.planning.machine import Machine
from nexus_ray.planning.needs import GIB


@pytest.fixture
def machine() -> Callable[..., Machine]:
    """A function (memory in GiB, gpus in GiB, disk in GiB) -> a machine."""

    def make(memory: float = 24, gpus: tuple[float, ...] = (), disk: float = 100) -> Machine:
        return Machine(int(memory * GIB), None, tuple(int(gpu * GIB) for gpu in gpus), int(disk * GIB))

    return make


@pytest.fixture
def saved_bytes() -> Callable[..., int]:
    """A function (compute, model=None) -> bytes of the distinct storages, parameters aside, kept for backward."""

    def measure(compute: Callable[[], Tensor], model: nn.Module | None = None) -> int:
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()} if model else set()
        found: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = compute()
        total = sum(t.untyped_storage().nbytes() for pointer, t in found.items() if pointer not in weights)
        del kept
        return total

    return measure


Compute = Callable[[], object]


@pytest.fixture
def most_allocated(tmp_path: Path) -> Callable[[Compute], int]:
    """A function (compute) -> bytes of tensors that it holds at its worst moment beside those that were there."""
    return lambda compute: max(_allocated(compute, tmp_path))


@pytest.fixture
def left_allocated(tmp_path: Path) -> Callable[[Compute], int]:
    """A function (compute) -> bytes of tensors that its result keeps alive beside those that were there."""

    def measure(compute: Compute) -> int:
        compute()  # what it keeps for every later call is there then
        return _allocated(compute, tmp_path)[-1]

    return measure


def _allocated(compute: Compute, directory: Path) -> list[int]:
    """Bytes of tensors after each allocation and release, beside those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = compute()
    profiler.export_chrome_trace(str(directory / "trace.json"))
    del kept
    events = json.loads((directory / "trace.json").read_text())["traceEvents"]
    memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]
    return [event["args"]["Total Allocated"] - before for event in memory]
