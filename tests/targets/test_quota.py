"""Which shards reach a number of tokens: the fewest first ones, found in few rounds without much wasted work."""

from __future__ import annotations

import numpy as np
import pytest

from nexus_ray.data.sources import Shard
from nexus_ray.targets.writing import quota
from nexus_ray.targets.writing.shard_keys import ShardWork


def shards(estimates: list[float]) -> list[ShardWork]:
    return [
        ShardWork(Shard(index, "play", "play.jsonl", index, index + 1), f"{index:016x}", True, False, estimate)
        for index, estimate in enumerate(estimates)
    ]


def play(work: list[ShardWork], tokens: list[int], wanted: int | None, known: dict[str, int]) -> tuple[list[int], int]:
    """Numbers of the chosen shards and the rounds it took; `known` grows."""
    truth = {item.name: count for item, count in zip(work, tokens, strict=True)}
    rounds = 0
    while missing := quota.missing(work, known, wanted):
        rounds += 1
        known |= {item.name: truth[item.name] for item in missing}
    return [item.shard.index for item in quota.enough(work, known, wanted)], rounds


def fewest(tokens: list[int], wanted: int | None) -> list[int]:
    if wanted is None:
        return list(range(len(tokens)))
    reached = np.cumsum(tokens) >= wanted
    return list(range(int(reached.argmax()) + 1 if reached.any() else len(tokens)))


@pytest.mark.parametrize("seed", range(30))
def test_it_is_the_fewest_first_shards_whatever_was_known_before(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 1000, 40).tolist()
    work = shards((np.asarray(tokens) * generator.uniform(0.05, 3, 40) + 1).tolist())
    wanted = [None, 1, int(generator.integers(1, sum(tokens))), sum(tokens) + 5][seed % 4]
    some = generator.choice(40, int(generator.integers(0, 20)), replace=False)
    for known in ({}, {work[index].name: tokens[index] for index in some.tolist()}):
        assert play(work, tokens, wanted, known)[0] == fewest(tokens, wanted)


@pytest.mark.parametrize("bytes_a_token", [2.5, 4.0, 5.5])
def test_usual_text_takes_few_rounds_and_wastes_little(bytes_a_token: float) -> None:
    generator = np.random.default_rng(0)
    size = 1 << 20
    tokens = (size / bytes_a_token * generator.normal(1, 0.05, 400)).astype(int).tolist()
    wanted, known = sum(tokens) // 3, {}
    chosen, rounds = play(shards([size / 8] * 400), tokens, wanted, known)
    assert chosen == fewest(tokens, wanted)
    assert rounds <= 4
    assert len(known) <= len(chosen) * 1.03


def test_nothing_is_made_where_what_is_known_is_enough() -> None:
    work = shards([10.0, 10.0, 10.0])
    assert quota.missing(work, {work[0].name: 50}, 50) == []
    assert [item.shard.index for item in quota.missing(work, {work[0].name: 50}, 51)] == [1]


def test_tokens_are_expected_in_proportion_to_what_was_measured() -> None:
    work = shards([10.0, 30.0, 20.0])
    ratio = quota.tokens_per_estimate(work, {work[0].name: 25, work[1].name: 95})
    assert ratio == 3.0
    assert quota.expected_tokens(work[2], ratio) == 60
    assert quota.expected_tokens(shards([0.001])[0], ratio) == 1
