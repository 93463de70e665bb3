"""The K largest of each row: exactly, in a stated order, and on a CPU twice as fast as `torch.topk` or more.

Rows of logits are long and K is small. The K-th largest of the maxima of disjoint groups is a lower bound of the K-th
largest value, so nearly everything is discarded by one comparison; what is left is short. NumPy's partition and its
search for true values are many times as fast as torch's on a CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_ray.targets.encoding.bits import true_places

# Groups of a row: enough that few candidates are left, few enough that choosing among their maxima costs little.
_GROUPS_PER_KEPT = 3
_LEAST_GROUPS = 192


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K largest of each row of [rows, columns] float32 values without NaN, in the order of their columns.

    Of equal values at the boundary those in the first columns are kept, so that the result does not depend on the
    device.

    Returns:
        values [rows, K] and columns [rows, K] int64, ascending.
    """
    rows, columns = values.shape
    if not rows:
        return values.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=values.device)
    if values.is_cuda:
        places = _places(values, values.topk(k).values[:, -1:], k)
    else:
        found, where = _candidates(values, k)
        kept = _places(torch.from_numpy(found), torch.from_numpy(_kth_largest(found, k)), k)
        places = torch.from_numpy(where.reshape(-1)[kept.numpy()])
    starts = torch.arange(rows, device=values.device).unsqueeze(-1) * columns
    return values.flatten()[places].view(rows, k), places.view(rows, k) - starts


def _places(values: Tensor, threshold: Tensor, k: int) -> Tensor:
    """[rows * k] places in the flattened values of those kept, where `threshold` [rows, 1] is the k-th largest."""
    places = true_places(values >= threshold)
    if len(places) == k * len(values):
        return places
    above, equal = values > threshold, values == threshold
    spare = k - above.sum(-1, keepdim=True)
    return true_places(above | (equal & (equal.cumsum(-1) <= spare)))


def _candidates(values: Tensor, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """[rows, most] values that hold the k largest of each row, filled with -inf, and their places in all rows."""
    rows, columns = values.shape
    groups = min(columns, max(_GROUPS_PER_KEPT * k, _LEAST_GROUPS))
    covered = columns // groups * groups
    # Groups of far-apart columns: tokens of similar frequency, and so of similar logits, have similar numbers.
    maxima = values[:, :covered].view(rows, -1, groups).amax(1)
    every = values.numpy()
    places = np.flatnonzero(every >= _kth_largest(maxima.numpy(), k))
    counts = np.bincount(places // columns, minlength=rows)
    most = int(counts.max())
    slots = np.arange(len(places)) + (np.arange(rows) * most - counts.cumsum() + counts).repeat(counts)
    found, where = np.full(rows * most, -np.inf, dtype=every.dtype), np.zeros(rows * most, dtype=places.dtype)
    found[slots], where[slots] = every.reshape(-1)[places], places
    return found.reshape(rows, most), where


def _kth_largest(values: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """[rows, 1]."""
    at = values.shape[-1] - k
    return np.partition(values, at, axis=-1)[:, at : at + 1]
