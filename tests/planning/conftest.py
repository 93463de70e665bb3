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


@pytest.fixture
def most_allocated(tmp_path: Path) -> Callable[[Callable[[], object]], int]:
    """A function (compute) -> bytes of tensors that it holds at its worst moment beside those that were there."""

    def measure(compute: Callable[[], object]) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            compute()
        profiler.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        memory = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
        before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]
        return max(event["args"]["Total Allocated"] for event in memory) - before

    return measure
