"""Choosing the K largest against a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nexus_ray.targets.encoding.selection import largest

torch.set_num_threads(1)


def by_stable_sort(values: torch.Tensor, k: int) -> np.ndarray:
    """Columns of the K largest, first columns first among equals, ascending."""
    return np.sort(np.argsort(-values.double().numpy(), axis=-1, kind="stable")[:, :k], axis=-1)


@pytest.mark.parametrize("seed", range(10))
def test_the_largest_are_those_of_a_stable_sort(seed):
    random = np.random.default_rng(seed)
    columns = int(random.choice([3, 50, 400, 1000, 4117, 20_000]))
    k = int(random.integers(1, min(columns, 200) + 1))
    values = torch.from_numpy(random.normal(size=(7, columns)).astype(np.float32))
    if seed % 2:
        values = (values * 4).round() / 4  # many equal values
    found, places = largest(values, k)
    assert np.array_equal(places.numpy(), by_stable_sort(values, k))
    assert torch.equal(found, values.gather(-1, places))


@pytest.mark.parametrize("k", [1, 64, 999, 1000])
def test_of_equal_values_the_first_columns_are_kept(k):
    _, places = largest(torch.zeros(3, 1000), k)
    assert places.tolist() == [list(range(k))] * 3


def test_minus_infinity_is_kept_only_where_nothing_else_is_left():
    values = torch.full((2, 500), -torch.inf)
    values[0, 400], values[0, 7] = 1.0, -3.0
    values[1] = torch.arange(500.0)
    found, places = largest(values, 4)
    assert places.tolist() == [[0, 1, 7, 400], [496, 497, 498, 499]]
    assert found[0].tolist() == [-torch.inf, -torch.inf, -3.0, 1.0]


def test_rows_that_are_not_contiguous_and_no_rows_at_all():
    values = torch.randn(900, 6, generator=torch.Generator().manual_seed(0)).T
    assert np.array_equal(largest(values, 5)[1].numpy(), by_stable_sort(values, 5))
    assert largest(values[:0], 5)[1].shape == (0, 5)
