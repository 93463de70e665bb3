"""Spreading layers over devices: contiguous, balanced, and without a change in what the model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.families import family_of
from nexus_ray.modeling.placement import split_layers
from nexus_ray.modeling.weights import build_model


def loads(sizes: list[int], first: int, placed: list[int]) -> list[int]:
    totals = [first if device == 0 else 0 for device in range(max(placed) + 1)]
    for size, device in zip(sizes, placed, strict=True):
        totals[device] += size
    return totals


def test_equal_layers_are_spread_evenly() -> None:
    assert split_layers([10] * 6, 0, 3) == [0, 0, 1, 1, 2, 2]


def test_what_the_first_device_also_holds_counts() -> None:
    assert split_layers([10] * 6, 20, 2) == [0, 0, 1, 1, 1, 1]


def test_one_device_gets_everything() -> None:
    assert split_layers([3, 4, 5], 7, 1) == [0, 0, 0]


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_no_contiguous_split_has_a_smaller_maximum(devices: int) -> None:
    sizes, first = [5, 1, 8, 3, 3, 9, 2], 4
    placed = split_layers(sizes, first, devices)
    assert placed == sorted(placed)
    best = min(max(loads(sizes, first, split)) for split in contiguous_splits(len(sizes), devices))
    assert max(loads(sizes, first, placed)) == best


def contiguous_splits(layers: int, devices: int) -> list[list[int]]:
    """Every way to give `layers` in order to at most `devices`, the first device perhaps getting none."""
    splits = [[device] for device in range(devices)]
    for _ in range(layers - 1):
        splits = [[*split, device] for split in splits for device in range(split[-1], devices)]
    return splits


def test_two_devices_compute_what_one_does(micro_model: Path) -> None:
    config = read_model_config(micro_model)
    input_ids = torch.randint(0, 4096, (2, 40), generator=torch.Generator().manual_seed(0))
    logits = []
    for devices in ([torch.device("cpu")], [torch.device("cpu"), torch.device("cpu", 0)]):
        model = build_model(
            micro_model, config, family_of(config), experts="packed", dtype=torch.float32, devices=devices
        )
        with torch.no_grad():
            logits.append(model(input_ids=input_ids).logits)
    assert torch.equal(*logits)
