"""Bytes of AdamW: its moments, and its update in the making (`training/optimiser.py`)."""

from __future__ import annotations

from math import ceil

from nexus_ray.planning.needs import Device

_FLOAT32 = 4
# Of bitsandbytes' AdamW8bit: smaller tensors keep float32 moments, larger ones a byte a value and a float32 a block.
_SMALLEST, _BLOCK = 4096, 256
# Float32 values a parameter while its update is computed on a CPU, one tensor at a time.
_UPDATE_UNITS = {"adamw": 2, "adamw_8bit": 5}


def moment_bytes(elements: int, optimiser: str) -> int:
    """Both moments of a tensor, as `train.optimiser.name` keeps them."""
    if optimiser == "adamw" or elements < _SMALLEST:
        return 2 * elements * _FLOAT32
    return 2 * (elements + ceil(elements / _BLOCK) * _FLOAT32)


def update_bytes(trained: int, largest: int, optimiser: str, device: Device) -> int:
    """What the update needs: of the largest tensor on a CPU; on a GPU of all, or nothing where a kernel does it all.

    Args:
        trained: elements of all trained tensors.
        largest: of the largest one.
        optimiser: `train.optimiser.name`.
        device: where they are.
    """
    if device == "cpu":
        return _UPDATE_UNITS[optimiser] * largest * _FLOAT32
    return trained * _FLOAT32 if optimiser == "adamw" else 0
