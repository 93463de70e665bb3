"""Fixtures of the planning tests: machines that do not exist, and what autograd really keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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
