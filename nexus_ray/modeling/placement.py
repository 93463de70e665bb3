"""Where the layers of a model go when one worker sees several GPUs: contiguous groups, balanced by bytes.

The embedding, the final norm and the LM head share the first device with the first layers, so that token ids go in
and logits come out on the same device; hidden states travel between groups. What else the first device is to hold,
such as a service's key-value cache, counts as its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def split_layers(layer_bytes: Sequence[int], first_bytes: int, devices: int) -> list[int]:
    """Device index of each layer: contiguous groups whose largest total is as small as possible.

    Args:
        layer_bytes: size of each layer.
        first_bytes: what the first device holds besides its layers.
        devices: how many there are.
    """
    low, high = max([first_bytes, *layer_bytes]), first_bytes + sum(layer_bytes)
    while low < high:
        middle = (low + high) // 2
        if _fill(layer_bytes, first_bytes, middle)[-1] < devices:
            high = middle
        else:
            low = middle + 1
    return _fill(layer_bytes, first_bytes, low)


def _fill(layer_bytes: Sequence[int], first_bytes: int, capacity: int) -> list[int]:
    """Device of each layer when every device is filled up to `capacity` before the next is begun."""
    device, used, placed = 0, first_bytes, []
    for size in layer_bytes:
        if used + size > capacity:
            device, used = device + 1, 0
        used += size
        placed.append(device)
    return placed


def follow_devices(modules: Sequence[nn.Module], devices: Sequence[torch.device]) -> None:
    """Make each module move its tensor inputs to its own device before it runs."""
    for module, device in zip(modules, devices, strict=True):
        module.register_forward_pre_hook(_mover(device), with_kwargs=True)


def moved(values: Any, device: torch.device) -> Any:
    """The same lists, tuples and dicts with every tensor in them on `device`."""
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, values)


def _mover(device: torch.device) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return moved(args, device), moved(kwargs, device)

    return hook
