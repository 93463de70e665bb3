"""Two halves of a text, of about one size and as independent as it allows: whole shards, or one that is cut.

Halves that share no shard share no document. That is given up only where whole shards cannot be balanced, for a single
one above all: then one shard is cut between two sequences, and at most the document at the cut is in both halves.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_BALANCED = 0.9  # of an even share: a lighter half of this size is no reason to cut a shard


def first_half_shares(sizes: NDArray[np.float64], wanted: float = math.inf) -> NDArray[np.float64]:
    """How much of each shard, from its beginning, belongs to the first half; the rest, at its end, to the second.

    Shards go whole to the half that is smaller so far, the largest first. Where that leaves a half with less than
    `wanted` and less than 0.9 of an even share, the largest shard of the other half is cut so that both are equal.

    Args:
        sizes: [shards] above 0, in tokens or any other unit.
        wanted: what is enough for a half, in the same unit.

    Returns:
        [shards] 1 for a shard of the first half, 0 for one of the second, between them for one that is cut.
    """
    shares = np.zeros(len(sizes))
    totals = [0.0, 0.0]
    for index in np.argsort(-sizes, kind="stable"):
        half = totals.index(min(totals))
        shares[index] = 1 - half
        totals[half] += float(sizes[index])
    if len(sizes) and min(totals) < min(wanted, _BALANCED * sum(totals) / 2):
        heavy = totals.index(max(totals))
        cut = int(np.argmax(np.where(shares == 1 - heavy, sizes, 0)))
        moved = (max(totals) - min(totals)) / 2 / float(sizes[cut])
        shares[cut] = moved if heavy else 1 - moved
    return shares


def halves_of_shard(num_tokens: NDArray[np.int32], first_half: float) -> NDArray[np.int32]:
    """The half, 0 or 1, of each sequence of a shard.

    Args:
        num_tokens: [sequences] in the order of the text.
        first_half: share of the shard's tokens that belongs to the first half, met as nearly as sequences allow.
    """
    middles = np.cumsum(num_tokens) - num_tokens / 2
    return (middles > first_half * num_tokens.sum()).astype(np.int32)


def divide_in_halves(
    shards: NDArray[np.int32], num_tokens: NDArray[np.int32], wanted: float = math.inf
) -> NDArray[np.int32]:
    """The half, 0 or 1, of each sequence of a source.

    Args:
        shards: [sequences] the shard each one comes from, in rising order.
        num_tokens: [sequences] tokens of each.
        wanted: tokens that are enough for a half.
    """
    numbers, first = np.unique(shards, return_index=True)
    pieces = np.split(num_tokens, first[1:]) if len(numbers) else []
    shares = first_half_shares(np.asarray([piece.sum() for piece in pieces], np.float64), wanted)
    halves = [halves_of_shard(piece, share) for piece, share in zip(pieces, shares.tolist(), strict=True)]
    return np.concatenate([np.zeros(0, np.int32), *halves])
