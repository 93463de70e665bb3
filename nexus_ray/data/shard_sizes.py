"""How much text shards hold, estimated from sizes of files: nothing of them is read or tokenised."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nexus_ray.data.references import is_reference
from nexus_ray.data.sources import Shard, text_size

_BYTES_A_TOKEN = 8  # more than text has, lines of JSON and rare alphabets apart: who plans with it reads enough


def estimate_tokens(shards: Sequence[Shard]) -> NDArray[np.float64]:
    """[shards] tokens, rather too few than too many, and in proportion to the text of shards of one kind of file.

    Args:
        shards: all shards of each of the files and datasets that they come from.
    """
    ends: dict[str, int] = {}
    for shard in shards:
        ends[shard.path] = max(shard.stop, ends.get(shard.path, 0))
    sizes = {path: _size(path, end) for path, end in ends.items()}
    sizes_of_shards = [sizes[shard.path] * (shard.stop - shard.start) / ends[shard.path] for shard in shards]
    return np.maximum(np.asarray(sizes_of_shards, np.float64) / _BYTES_A_TOKEN, 1)


def _size(path: str, end: int) -> int:
    """Bytes of a file, which a shard of plain text counts in, or of what row groups and rows are parts of."""
    return text_size(path) if is_reference(path) or path.endswith(".parquet") else end
