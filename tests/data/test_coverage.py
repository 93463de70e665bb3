"""Calibration sequences: the greedy choice against plain greedy and the optimum, the baseline against its formula."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from nexus_ray.data.coverage import (
    CalibrationSample,
    TokenCounts,
    choose_by_coverage,
    choose_like_reference,
    choose_randomly,
    coverage,
    describe_sample,
)

Pool = list[NDArray[np.int32]]
Choose = Callable[[TokenCounts, int], NDArray[np.int64]]
EVERY_WAY: list[Choose] = [
    lambda counts, budget: choose_by_coverage(counts, budget, seed=3),
    lambda counts, budget: choose_randomly(counts, budget, seed=3),
    lambda counts, budget: choose_like_reference(counts, budget),
    lambda counts, budget: choose_like_reference(counts, budget, rounds=3),
]
every_way = pytest.mark.parametrize("choose", EVERY_WAY, ids=["coverage", "random", "reference", "reference-rounds"])


def make_pool(seed: int, candidates: int = 30, longest: int = 40, vocabulary: int = 60) -> Pool:
    """Candidates of unequal lengths from a vocabulary with a long tail."""
    generator = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, vocabulary + 1)
    frequency /= frequency.sum()
    lengths = generator.integers(1, longest + 1, candidates)
    return [generator.choice(vocabulary, size=length, p=frequency).astype(np.int32) for length in lengths]


def equal_pool(seed: int, candidates: int, length: int) -> Pool:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 12, length).astype(np.int32) for _ in range(candidates)]


def count(pool: Pool) -> TokenCounts:
    return TokenCounts.from_sequences(pool)


def tokens_in(pool: Pool, chosen: list[int] | NDArray[np.int64]) -> int:
    return sum(len(pool[i]) for i in chosen)


def coverage_of(pool: Pool, chosen: list[int] | NDArray[np.int64] | tuple[int, ...]) -> float:
    """F(S) by its definition."""
    totals = Counter(token for i in chosen for token in pool[i].tolist())
    return math.fsum(math.sqrt(n) for n in totals.values())


def plain_choice(pool: Pool, budget: int, seed: int) -> list[int]:
    """The greedy choice, begun with the best single candidate where that alone covers more."""
    rank = np.random.default_rng(seed).permutation(len(pool)).tolist()
    greedy = plain_greedy(pool, budget, rank, [])
    fitting = [i for i in range(len(pool)) if len(pool[i]) <= budget]
    best = min(fitting, key=lambda i: (-coverage_of(pool, [i]), rank[i]))
    return plain_greedy(pool, budget, rank, [best]) if coverage_of(pool, [best]) > coverage_of(pool, greedy) else greedy


def plain_greedy(pool: Pool, budget: int, rank: list[int], start: list[int]) -> list[int]:
    """Greedy that scores every candidate that fits, for every pick; gains equal to 12 decimals are ties."""
    chosen = list(start)
    while True:
        left = budget - tokens_in(pool, chosen)
        fitting = [i for i in range(len(pool)) if i not in chosen and 0 < len(pool[i]) <= left]
        if not fitting:
            return chosen
        before = coverage_of(pool, chosen)
        gains = {i: round((coverage_of(pool, [*chosen, i]) - before) / len(pool[i]), 12) for i in fitting}
        chosen.append(min(fitting, key=lambda i: (-gains[i], rank[i])))


def best_of_all(pool: Pool, budget: int) -> float:
    """The largest coverage that any set within the budget has."""
    sets = (s for size in range(len(pool) + 1) for s in combinations(range(len(pool)), size))
    return max(coverage_of(pool, s) for s in sets if tokens_in(pool, s) <= budget)


def reference_score(pool: Pool, chosen: list[int], candidate: int) -> float:
    """-KL(chosen and candidate || pool) + 0.01 x tokens, token by token over the union of both."""
    whole = Counter(token for sequence in pool for token in sequence.tolist())
    sample = Counter(token for i in [*chosen, candidate] for token in pool[i].tolist())
    union = set(whole) | set(sample)
    divergence = 0.0
    for token in union:
        p = (sample[token] + 1e-10) / (sample.total() + 1e-10 * len(union))
        q = (whole[token] + 1e-10) / (whole.total() + 1e-10 * len(union))
        divergence += p * math.log(p / q)
    return -divergence + 0.01 * len(pool[candidate])


def plain_reference(pool: Pool, budget: int, a_round: int = 1) -> list[int]:
    """The reference's greedy choice, the best `a_round` of a round taken together."""
    chosen: list[int] = []
    while True:
        left = budget - tokens_in(pool, chosen)
        fitting = [i for i in range(len(pool)) if i not in chosen and 0 < len(pool[i]) <= left]
        if not fitting:
            return chosen
        scores = {i: reference_score(pool, chosen, i) for i in fitting}
        for i in sorted(fitting, key=lambda i: -scores[i])[:a_round]:
            if tokens_in(pool, chosen) + len(pool[i]) <= budget:
                chosen.append(i)


class TestTokenCounts:
    def test_each_candidate_keeps_its_distinct_tokens_and_their_counts(self):
        pool = make_pool(0)
        counts = count(pool)
        assert len(counts) == len(pool)
        for i, sequence in enumerate(pool):
            tokens, occurrences = counts.entries(i)
            assert dict(zip(tokens.tolist(), occurrences.tolist(), strict=True)) == Counter(sequence.tolist())
            assert counts.lengths[i] == len(sequence)

    def test_the_arrays_have_the_types_they_declare(self):
        for counts in (count(make_pool(0)), count([]), count([np.zeros(0, dtype=np.int32)])):
            assert counts.offsets.dtype == counts.lengths.dtype == np.int64
            assert counts.tokens.dtype == counts.counts.dtype == np.int32

    def test_a_stream_is_counted_like_a_list(self):
        pool = make_pool(1)
        streamed = TokenCounts.from_sequences(iter(pool))
        assert np.array_equal(streamed.tokens, count(pool).tokens)


class TestCoverage:
    @pytest.mark.parametrize("seed", range(5))
    def test_it_is_the_sum_of_roots_of_the_counts(self, seed):
        pool = make_pool(seed)
        chosen = np.random.default_rng(seed).permutation(len(pool))[:7]
        assert coverage(count(pool), chosen) == pytest.approx(coverage_of(pool, chosen), rel=1e-12)

    def test_nothing_chosen_covers_nothing(self):
        assert coverage(count(make_pool(0)), np.zeros(0, dtype=np.int64)) == 0


class TestChooseByCoverage:
    @pytest.mark.parametrize("seed", range(12))
    @pytest.mark.parametrize("budget", [40, 150, 400])
    def test_lazy_greedy_picks_what_plain_greedy_picks(self, seed, budget):
        pool = make_pool(seed)
        chosen = choose_by_coverage(count(pool), budget, seed)
        assert chosen.tolist() == plain_choice(pool, budget, seed)

    @pytest.mark.parametrize("seed", range(10))
    def test_equal_lengths_reach_the_bound_of_the_optimum(self, seed):
        pool = equal_pool(seed, candidates=10, length=6)
        chosen = choose_by_coverage(count(pool), 24, seed)
        assert coverage_of(pool, chosen) >= (1 - 1 / math.e) * best_of_all(pool, 24)

    @pytest.mark.parametrize("seed", range(10))
    @pytest.mark.parametrize("budget", [10, 25, 60])
    def test_unequal_lengths_reach_half_the_bound(self, seed, budget):
        pool = make_pool(seed, candidates=10, longest=30)
        budget = max(budget, min(map(len, pool)))
        chosen = choose_by_coverage(count(pool), budget, seed)
        assert coverage_of(pool, chosen) >= (1 - 1 / math.e) / 2 * best_of_all(pool, budget)

    def test_a_single_long_candidate_wins_over_a_short_one_with_a_better_rate(self):
        long = np.append(np.arange(1, 100), 1).astype(np.int32)  # 99 distinct tokens of 100
        pool = [np.asarray([0], dtype=np.int32), long]
        assert choose_by_coverage(count(pool), 100, 0).tolist() == [1]

    def test_what_still_fits_beside_the_single_candidate_is_chosen_too(self):
        long = np.append(np.arange(1, 99), 1).astype(np.int32)
        pool = [np.asarray([5], dtype=np.int32), long, np.asarray([0], dtype=np.int32)]
        assert choose_by_coverage(count(pool), 100, 0).tolist() == [1, 2]

    def test_equal_candidates_are_taken_in_the_order_of_the_seed(self):
        pool = [np.arange(5, dtype=np.int32) + 5 * i for i in range(20)]
        orders = {tuple(choose_by_coverage(count(pool), 50, seed).tolist()) for seed in range(5)}
        assert len(orders) == 5
        expected = np.argsort(np.random.default_rng(4).permutation(20))[:10]
        assert choose_by_coverage(count(pool), 50, 4).tolist() == expected.tolist()

    def test_rare_words_come_before_repetition(self):
        pool = [np.zeros(10, dtype=np.int32), np.zeros(10, dtype=np.int32), np.arange(10, dtype=np.int32)]
        assert choose_by_coverage(count(pool), 10, 0).tolist() == [2]

    @pytest.mark.parametrize("seed", range(5))
    def test_it_covers_more_than_random_choice(self, seed):
        counts = count(make_pool(seed, candidates=200, vocabulary=2000))
        at_random = [coverage(counts, choose_randomly(counts, 500, draw)) for draw in range(20)]
        assert coverage(counts, choose_by_coverage(counts, 500, seed)) > max(at_random)


class TestChooseLikeReference:
    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("budget", [40, 150, 300])
    def test_it_picks_what_the_formula_picks(self, seed, budget):
        pool = make_pool(seed)
        assert choose_like_reference(count(pool), budget).tolist() == plain_reference(pool, budget)

    @pytest.mark.parametrize("seed", range(4))
    def test_candidates_of_equal_length_are_told_apart_by_the_divergence(self, seed):
        pool = equal_pool(seed, candidates=20, length=15)
        assert choose_like_reference(count(pool), 120).tolist() == plain_reference(pool, 120)

    @pytest.mark.parametrize("seed", range(4))
    def test_rounds_take_the_best_of_each_round_together(self, seed):
        pool = equal_pool(seed, candidates=24, length=10)
        chosen = choose_like_reference(count(pool), 120, rounds=3)  # 12 candidates fit: 4 a round
        assert chosen.tolist() == plain_reference(pool, 120, a_round=4)
        assert chosen.tolist() != plain_reference(pool, 120), "rounds make a difference here"

    def test_a_budget_above_the_pool_leaves_the_rounds_as_they_are(self):
        counts = count(equal_pool(0, candidates=24, length=10))
        whole = choose_like_reference(counts, 240, rounds=4).tolist()
        assert choose_like_reference(counts, 10**9, rounds=4).tolist() == whole
        assert choose_like_reference(counts, 10**9, rounds=1).tolist() != whole

    def test_enough_rounds_are_the_same_as_no_rounds(self):
        counts = count(make_pool(0))
        assert np.array_equal(choose_like_reference(counts, 200, rounds=1000), choose_like_reference(counts, 200))


class TestBudget:
    @every_way
    @pytest.mark.parametrize("seed", range(5))
    def test_it_is_kept_and_nothing_that_fits_is_left(self, choose, seed):
        pool = make_pool(seed)
        for budget in np.random.default_rng(seed).integers(40, 700, 10).tolist():
            chosen = choose(count(pool), budget).tolist()
            left = budget - tokens_in(pool, chosen)
            assert left >= 0
            assert len(set(chosen)) == len(chosen)
            assert all(len(pool[i]) > left for i in range(len(pool)) if i not in chosen)

    @every_way
    @pytest.mark.parametrize("budget", [-5, 0, 1, 6])
    def test_below_the_shortest_candidate_the_shortest_is_chosen(self, choose, budget):
        pool = [np.arange(length, dtype=np.int32) for length in (9, 0, 7, 30)]
        assert choose(count(pool), budget).tolist() == [2]

    @every_way
    @pytest.mark.parametrize("budget", [610, 611, 10**15])
    def test_above_the_pool_all_are_chosen(self, choose, budget):
        pool = equal_pool(0, candidates=61, length=10)
        assert sorted(choose(count(pool), budget).tolist()) == list(range(61))

    @every_way
    def test_candidates_without_tokens_are_never_chosen(self, choose):
        empty = np.zeros(0, dtype=np.int32)
        pool = [empty, np.arange(4, dtype=np.int32), empty, np.arange(3, dtype=np.int32)]
        assert sorted(choose(count(pool), 100).tolist()) == [1, 3]

    @every_way
    @pytest.mark.parametrize("pool", [[], [np.zeros(0, dtype=np.int32)] * 3], ids=["no candidates", "only empty ones"])
    def test_nothing_is_chosen_from_nothing(self, choose, pool):
        chosen = choose(count(pool), 100)
        assert chosen.tolist() == []
        assert chosen.dtype == np.int64

    @every_way
    def test_the_choice_is_the_same_every_time(self, choose):
        pool = make_pool(2)
        assert np.array_equal(choose(count(pool), 200), choose(count(pool), 200))


def test_random_choice_differs_with_the_seed():
    counts = count(make_pool(0))
    assert choose_randomly(counts, 200, 0).tolist() != choose_randomly(counts, 200, 1).tolist()


class TestDescribeSample:
    def test_the_figures_are_those_of_the_choice(self):
        pool = make_pool(5, candidates=60)
        counts = count(pool)
        chosen = choose_by_coverage(counts, 300, 5)
        sample = describe_sample(counts, chosen, 300, "coverage", 5)
        assert (sample.method, sample.candidates, sample.sequences) == ("coverage", 60, len(chosen))
        assert sample.candidate_tokens == tokens_in(pool, list(range(60)))
        assert sample.tokens == tokens_in(pool, chosen) <= 300
        assert sample.distinct_tokens == len({token for i in chosen for token in pool[i].tolist()})
        assert sample.coverage == pytest.approx(coverage_of(pool, chosen))

    def test_the_baselines_have_the_same_budget(self):
        pool = equal_pool(1, candidates=40, length=10)
        counts = count(pool)
        sample = describe_sample(counts, choose_randomly(counts, 200, 7), 200, "random", 7)
        draws = [coverage_of(pool, choose_randomly(counts, 200, seed)) for seed in range(8, 13)]
        assert sample.random_coverage == pytest.approx(sum(draws) / 5)
        assert sample.reference_coverage == pytest.approx(coverage_of(pool, plain_reference(pool, 200)))

    def test_it_survives_json(self):
        counts = count(make_pool(0))
        sample = describe_sample(counts, choose_randomly(counts, 100, 0), 100, "random", 0)
        assert CalibrationSample.model_validate_json(sample.model_dump_json()) == sample

    def test_a_field_it_does_not_know_is_refused(self):
        counts = count(make_pool(0))
        fields = describe_sample(counts, choose_randomly(counts, 100, 0), 100, "random", 0).model_dump()
        with pytest.raises(ValidationError, match="surprise"):
            CalibrationSample.model_validate(fields | {"surprise": 1})
