"""benchmarks/sampling.py on a small pool, and the parts that its claim rests on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_ray.data.coverage import TokenCounts, choose_like_reference

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "sampling.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, text=True)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    done = run("--candidates", "400", "--subset", "80", "--budget-share", "0.1", "0.3")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def benchmark(script):
    return script("sampling")


def test_the_choice_covers_more_than_both_baselines(result):
    for figures in (result, result["equal_lengths"], *result["by_budget_share"].values()):
        assert figures["coverage_vs_random"] > 1.02
        assert figures["coverage_vs_reference"] > 1.02
        assert figures["distinct_tokens"]["coverage"] > figures["distinct_tokens"]["random"]


def test_every_choice_fills_the_same_budget(result):
    for figures in (result, *result["by_budget_share"].values()):
        for tokens in figures["tokens"].values():
            assert 0.99 * figures["budget_tokens"] < tokens <= figures["budget_tokens"]


def test_the_plain_greedy_picks_the_same_and_takes_longer(result):
    assert result["same_picks_as_reference_greedy"]
    assert result["seconds_reference_greedy"] > result["seconds_reference_objective_ours"]


def test_a_pool_that_is_too_small_to_time_is_refused():
    done = run("--candidates", "10")
    assert done.returncode == 2
    assert "--candidates and --subset must be at least 80" in done.stderr


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_the_plain_greedy_agrees_at_any_budget(benchmark, share):
    generator = np.random.default_rng(0)
    pool = [generator.integers(0, 50, length) for length in generator.integers(1, 60, 40)]
    budget = benchmark.tokens_of(pool, share)
    expected = choose_like_reference(TokenCounts.from_sequences(pool), budget).tolist()
    assert benchmark.reference_greedy(pool, budget) == expected


def test_candidates_are_cut_from_the_text_and_lie_between_the_lengths(benchmark):
    documents = [np.arange(start, start + 5000) for start in (0, 10_000, 20_000)]
    pool = benchmark.make_pool(documents, 200, benchmark.log_uniform, seed=1)
    assert len(pool) == 200
    assert len({len(candidate) for candidate in pool}) > 50
    for candidate in pool:
        assert 32 <= len(candidate) <= 512
        assert (np.diff(candidate) == 1).all()
    assert {len(c) for c in benchmark.make_pool(documents, 100, benchmark.one_length, seed=1)} == {173}


def test_the_exponent_of_a_power_law_is_its_power(benchmark):
    assert benchmark.exponent([100, 200, 400], [3e-4, 12e-4, 48e-4]) == pytest.approx(2)
