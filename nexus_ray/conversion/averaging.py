"""The mean of some experts of a layer, streamed from the checkpoint in chunks that stay in the processor's cache.

Only the bytes of these experts are read. A chunk of rows of every expert is dequantised and added to a float32 total
before the next chunk is touched, so no expert ever exists as a whole and the total is written to memory once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from nexus_ray.errors import ModelError
from nexus_ray.families import ExpertParts, ExpertWeights, StoredPart

_ROWS = 512  # of 2880 float32 values: a chunk and its total stay in the cache, and reads are long enough for a disk
_THREADS = 2  # one computes while the other waits for the disk


def mean_expert(parts: ExpertParts, experts: Sequence[int]) -> ExpertWeights:
    """Mean of `experts` (at least one) of a layer, summed in float32 in the order given.

    Raises:
        ModelError: the mean of some rows is not finite; names the tensor.
    """
    with _single_threaded_operations(), ThreadPoolExecutor(_THREADS) as pool:
        return ExpertWeights(*(_mean_part(part, experts, pool) for part in parts))


def _mean_part(part: StoredPart, experts: Sequence[int], pool: ThreadPoolExecutor) -> Tensor:
    total = torch.empty(part.shape)
    list(pool.map(partial(_mean_rows, part, experts, total), range(0, part.shape[0], _ROWS)))
    return part.arrange(total)


def _mean_rows(part: StoredPart, experts: Sequence[int], total: Tensor, start: int) -> None:
    """Fill rows `start` and following of `total` with their mean."""
    chunk = total[start : start + _ROWS]
    chunk.copy_(part.read_rows(experts[0], start, start + len(chunk)))
    for expert in experts[1:]:
        chunk.add_(part.read_rows(expert, start, start + len(chunk)))
    if not torch.isfinite(chunk.sum()):  # NaN and infinity survive a sum
        raise ModelError(
            f"{part.name} holds NaN or infinity in rows {start} to {start + len(chunk)} of one of the experts "
            f"{', '.join(map(str, experts))}",
            "the checkpoint is damaged: download the model again",
        )
    chunk.div_(len(experts))


@contextmanager
def _single_threaded_operations() -> Iterator[None]:
    """Each torch operation in the thread that asks for it: chunks are too small to be worth dividing further."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
