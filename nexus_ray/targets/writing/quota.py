"""Which shards a source needs to reach a number of tokens: how many a shard holds is known only once it is tokenised.

Shards are taken in the order of the text, so the answer does not depend on which of them are known when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, inf

from nexus_ray.targets.writing.shard_keys import ShardWork

# Tokens of usual text for each one that `estimate_tokens` says, which is rather too low.
_USUAL_RATIO = 2.0
# Of the tokens wanted, the share to aim at while no shard was measured: shards beyond those wanted are wasted work.
_FIRST_SHARE = 0.5


def missing(work: Sequence[ShardWork], known: Mapping[str, int], wanted: int | None) -> list[ShardWork]:
    """Shards to make next; empty once `enough` is final.

    Args:
        work: shards of one source, in order.
        known: tokens of those that are made, by name.
        wanted: tokens; None wants all.
    """
    ratio = tokens_per_estimate(work, known)
    goal = inf if wanted is None else wanted * (1 if known.keys() & {item.name for item in work} else _FIRST_SHARE)
    total, chosen = 0.0, []
    for item in work:
        if total >= goal:
            break
        if item.name not in known:
            chosen.append(item)
        total += known.get(item.name, expected_tokens(item, ratio))
    return chosen


def enough(work: Sequence[ShardWork], known: Mapping[str, int], wanted: int | None) -> list[ShardWork]:
    """The fewest first shards that hold the tokens that are wanted, or all of them; arguments as `missing`."""
    total, chosen = 0, []
    for item in work:
        if wanted is not None and total >= wanted:
            break
        chosen.append(item)
        total += known[item.name]
    return chosen


def tokens_per_estimate(work: Sequence[ShardWork], known: Mapping[str, int]) -> float:
    """Tokens of a source's shards for each one estimated, as measured where shards are known."""
    made = [item for item in work if item.name in known]
    tokens, estimated = sum(known[item.name] for item in made), sum(item.estimate for item in made)
    return tokens / estimated if tokens else _USUAL_RATIO


def expected_tokens(item: ShardWork, ratio: float) -> int:
    """Tokens to expect of a shard that is not made yet, at least one."""
    return max(1, ceil(item.estimate * ratio))
