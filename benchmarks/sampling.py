"""Claim: calibration text chosen for coverage covers more than random text and than the reference's choice.

Coverage is the sum over the vocabulary of sqrt(occurrences); every choice has the same budget of tokens. The pool is
the repository's training text (Shakespeare, speeches, code) in the embedded tokenizer, cut into candidates of 32 to
512 tokens, lengths uniform in their logarithm, and a second time into candidates of one length. One pass over the
text gives about 7,600 candidates; for more it is cut again at other places, so that some overlap, like the
near-duplicates of a crawl. The reference's choice is its score (NEXUS v0.1.0) as nexus-ray computes it; a plain
greedy implementation, which walks the vocabulary for each candidate and pick, is timed on a subset and must pick the
same. Scaling figures are exponents: seconds grow with the number of candidates to this power, at one budget share.
Seconds are the least of three calls. The last line is one JSON object.

    python benchmarks/sampling.py --candidates 10000
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _common import command_line, print_result
from numpy.typing import NDArray
from transformers import AutoTokenizer

from nexus_ray.data.coverage import (
    TokenCounts,
    choose_by_coverage,
    choose_like_reference,
    choose_randomly,
    coverage,
)
from nexus_ray.data.documents import read_documents
from nexus_ray.data.encoding import encode_document
from nexus_ray.data.sources import Shard
from nexus_ray.errors import ConfigError

_ASSETS = Path(__file__).parents[1] / "assets"
_SOURCES = ("shakespeare", "speeches", "code")
_SHORTEST, _LONGEST = 32, 512
_ONE_LENGTH = 173  # the mean of lengths from 32 to 512 that are uniform in their logarithm
_RANDOM_DRAWS = 5
_REPEATS = 3
_EPSILON = 1e-10
_LENGTH_BONUS = 0.01
_FEWEST = 20  # candidates of the smallest subset that is timed

Pool = list[NDArray[np.int32]]
Lengths = Callable[[np.random.Generator], int]


def log_uniform(generator: np.random.Generator) -> int:
    """A length from 32 to 512 tokens."""
    return round(math.exp(generator.uniform(math.log(_SHORTEST), math.log(_LONGEST))))


def one_length(generator: np.random.Generator) -> int:
    """The same length for every candidate."""
    return _ONE_LENGTH


def tokenise() -> Pool:
    """Token ids of the training documents of the repository."""
    tokenizer = AutoTokenizer.from_pretrained(_ASSETS / "tiny-gpt-oss")
    documents: Pool = []
    for name in _SOURCES:
        path = _ASSETS / "text" / f"{name}.train.jsonl"
        shard = Shard(0, name, str(path), 0, path.stat().st_size)
        documents += [np.asarray(encode_document(tokenizer, text), dtype=np.int32) for text in read_documents(shard)]
    return documents


def cut(documents: Pool, lengths: Lengths, generator: np.random.Generator) -> Iterator[NDArray[np.int32]]:
    """One pass over the documents; each starts at a random place, and a rest that is too short is left out."""
    for document in documents:
        start = int(generator.integers(_SHORTEST))
        while start + (length := lengths(generator)) <= len(document):
            yield document[start : start + length]
            start += length


def make_pool(documents: Pool, candidates: int, lengths: Lengths, seed: int) -> Pool:
    """This many candidates in a random order, so that the first n of them are like all of them."""
    generator = np.random.default_rng(seed)
    pool: Pool = []
    while len(pool) < candidates:
        pool += list(cut(documents, lengths, generator))
    return [pool[i] for i in generator.permutation(len(pool))[:candidates]]


def reference_greedy(pool: Pool, budget: int) -> list[int]:
    """The reference's objective written plainly: each pick scores every candidate that fits, over all tokens."""
    counters = [Counter(sequence.tolist()) for sequence in pool]
    whole: Counter[int] = Counter()
    for counter in counters:
        whole.update(counter)
    sample: Counter[int] = Counter()
    chosen: list[int] = []
    free = dict.fromkeys(range(len(pool)))
    left = budget
    while fitting := [i for i in free if len(pool[i]) <= left]:
        best = max(fitting, key=lambda i: reference_score(sample, counters[i], whole))
        sample.update(counters[best])
        left -= len(pool[best])
        chosen.append(best)
        del free[best]
    return chosen


def reference_score(sample: Counter[int], candidate: Counter[int], whole: Counter[int]) -> float:
    """Minus the divergence of sample and candidate from the whole, in nats, and 0.01 for each token."""
    after = sample.copy()
    after.update(candidate)
    smoothing = _EPSILON * len(whole)
    scale = (whole.total() + smoothing) / (after.total() + smoothing)
    divergence = 0.0
    for token, in_whole in whole.items():
        smoothed = after[token] + _EPSILON
        divergence += smoothed * math.log(smoothed * scale / (in_whole + _EPSILON))
    return _LENGTH_BONUS * candidate.total() - divergence / (after.total() + smoothing)


def timed(work: Callable[..., list[int]], *arguments: Any) -> tuple[float, list[int]]:
    """Wall-clock seconds of a choice, the least of some calls, and what it chose."""
    seconds: list[float] = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        chosen = work(*arguments)
        seconds.append(time.perf_counter() - started)
    return min(seconds), chosen


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of log(seconds) over log(size), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def halved(largest: int, steps: int) -> list[int]:
    """Sizes up to the largest, each half of the next."""
    return sorted({max(largest >> step, _FEWEST) for step in range(steps)})


def tokens_of(pool: Pool, share: float) -> int:
    """The share of the pool's tokens."""
    return int(share * sum(map(len, pool)))


def compare(pool: Pool, share: float, rounds: int, seed: int) -> dict[str, Any]:
    """Coverage of the three choices at one budget."""
    counts = TokenCounts.from_sequences(pool)
    budget = tokens_of(pool, share)
    draws = [choose_randomly(counts, budget, seed + draw) for draw in range(_RANDOM_DRAWS)]
    chosen = {
        "coverage": [choose_by_coverage(counts, budget, seed)],
        "reference": [choose_like_reference(counts, budget, rounds)],
        "random": draws,
    }
    reached = {name: float(np.mean([coverage(counts, c) for c in choices])) for name, choices in chosen.items()}
    distinct = {name: [int(np.count_nonzero(counts.totals(c))) for c in choices] for name, choices in chosen.items()}
    return {
        "budget_tokens": budget,
        "coverage_vs_random": round(reached["coverage"] / reached["random"], 4),
        "coverage_vs_reference": round(reached["coverage"] / reached["reference"], 4),
        "coverage": {name: round(value, 1) for name, value in reached.items()},
        "distinct_tokens": {name: round(float(np.mean(values)), 1) for name, values in distinct.items()},
        "tokens": {name: int(counts.lengths[choices[0]].sum()) for name, choices in chosen.items()},
        "sequences": {name: len(choices[0]) for name, choices in chosen.items()},
        "vocabulary_of_the_pool": int(np.count_nonzero(counts.totals(np.arange(len(counts))))),
    }


def ours(pool: Pool, share: float, seed: int) -> list[int]:
    """Counting the tokens and choosing by coverage."""
    return list(map(int, choose_by_coverage(TokenCounts.from_sequences(pool), tokens_of(pool, share), seed)))


def ours_of_their_objective(pool: Pool, share: float) -> list[int]:
    """Counting the tokens and choosing by the reference's score, one pick a round."""
    return list(map(int, choose_like_reference(TokenCounts.from_sequences(pool), tokens_of(pool, share))))


def time_ours(pool: Pool, share: float, seed: int) -> dict[str, Any]:
    """Seconds and scaling of the choice by coverage, up to the whole pool."""
    sizes = halved(len(pool), 4)
    seconds = [timed(ours, pool[:size], share, seed)[0] for size in sizes]
    return {
        "seconds_ours": round(seconds[-1], 3),
        "scaling_ours": round(exponent(sizes, seconds), 2),
        "timings_ours": dict(zip(map(str, sizes), [round(s, 4) for s in seconds], strict=True)),
    }


def time_reference(pool: Pool, subset: int, share: float, seed: int) -> dict[str, Any]:
    """Seconds and scaling of the reference's objective written plainly, and ours on the same subset."""
    sizes = halved(min(subset, len(pool)), 3)
    plain = [timed(reference_greedy, pool[:size], tokens_of(pool[:size], share)) for size in sizes]
    seconds, picks = [s for s, _ in plain], plain[-1][1]
    part = pool[: sizes[-1]]
    fast, same = timed(ours_of_their_objective, part, share)
    return {
        "subset": len(part),
        "seconds_reference_greedy": round(seconds[-1], 3),
        "seconds_reference_objective_ours": round(fast, 4),
        "same_picks_as_reference_greedy": same == picks,
        "seconds_ours_on_subset": round(timed(ours, part, share, seed)[0], 4),
        "scaling_reference": round(exponent(sizes, seconds), 2),
        "timings_reference": dict(zip(map(str, sizes), [round(s, 4) for s in seconds], strict=True)),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of the result line; the first budget share is the headline."""
    started = time.perf_counter()
    documents = tokenise()
    pool = make_pool(documents, arguments.candidates, log_uniform, arguments.seed)
    even = make_pool(documents, arguments.candidates, one_length, arguments.seed)
    shares = arguments.budget_share
    by_share = {str(share): compare(pool, share, arguments.rounds, arguments.seed) for share in shares}
    for share, figures in by_share.items():
        print(f"budget {share}: {figures}", flush=True)
    return {
        **by_share[str(shares[0])],
        "equal_lengths": compare(even, shares[0], arguments.rounds, arguments.seed),
        "by_budget_share": by_share,
        **time_ours(pool, shares[0], arguments.seed),
        **time_reference(pool, arguments.subset, shares[0], arguments.seed),
        "candidates": len(pool),
        "candidate_tokens": sum(map(len, pool)),
        "reference_rounds": arguments.rounds,
        "seconds": round(time.perf_counter() - started, 1),
    }


def read_arguments() -> argparse.Namespace:
    """The command line.

    Raises:
        ConfigError: a number is out of its range.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--candidates", type=int, default=10_000, help="sequences to choose from (default 10000)")
    parser.add_argument(
        "--budget-share", type=float, nargs="+", default=[0.1, 0.02, 0.3], help="of the pool's tokens; the first leads"
    )
    parser.add_argument("--subset", type=int, default=400, help="candidates that the plain greedy is timed on")
    parser.add_argument("--rounds", type=int, help="of the reference's choice (default: one pick a round)")
    parser.add_argument("--seed", type=int, default=0, help="of the cuts and the choices")
    arguments = parser.parse_args()
    if min(arguments.candidates, arguments.subset) < 4 * _FEWEST:
        raise ConfigError(f"--candidates and --subset must be at least {4 * _FEWEST}")
    if not all(0 < share <= 1 for share in arguments.budget_share):
        raise ConfigError("--budget-share must be above 0 and at most 1")
    return arguments


def main() -> None:
    """Parse the arguments, measure, print."""
    with command_line():
        print_result(measure(read_arguments()))


if __name__ == "__main__":
    main()
