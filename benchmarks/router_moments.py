"""Exact router moments against scikit-learn's IncrementalPCA and a two-pass float64 reference.

Claim: moments merged batch by batch give the eigenvalues of the covariance of router probabilities to 1e-7, at
least 20 times as fast as IncrementalPCA, the streaming alternative, and in a state that does not grow with the tokens.
Both get the same finished probabilities. IncrementalPCA runs in its own default batch size and, for a second figure, in
the batch size that suits it best, and finds the 20 components of the reference system's importance; ours has all.
What `nexus-ray collect` does, from logits, with selections, co-selections and gate weights, is timed beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import reduce
from typing import TypeVar

import numpy as np
import torch
from _common import command_line, print_result
from numpy.typing import NDArray
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.utils import gen_batches
from torch import Tensor

from nexus_ray.console import progress
from nexus_ray.errors import ConfigError
from nexus_ray.router.accumulate import comoments, moments_of_logits
from nexus_ray.router.moments import RouterMoments

ResultT = TypeVar("ResultT")
_BATCH = 8192  # tokens of one forward pass
_SELECTED = 4
_COMPONENTS = 20  # as in the reference system's importance
_TRIAL_ROWS, _TRIAL_BATCHES = 65_536, (2048, 8192, 32_768)  # rows are a multiple of every batch
_DEFAULT_BATCH = 5  # times the number of columns: IncrementalPCA's own choice
_NEGLIGIBLE = 1e-12  # of the largest eigenvalue: probabilities sum to 1, so the smallest is zero
_SHAPE_120B = (36, 128)  # layers, experts


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="tokens")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    check_rows(arguments.rows, arguments.experts)
    torch.set_num_threads(arguments.threads)
    logits = make_logits(arguments.rows, arguments.experts)
    probabilities = torch.softmax(logits, dim=-1)
    exact = two_pass_eigenvalues(logits)

    covariance, seconds = timed(lambda: merged_covariance(probabilities))
    merged, collect_seconds = timed(lambda: merged_moments(logits))
    rows = probabilities.numpy()
    default, default_seconds = timed(lambda: incremental_pca(rows, _DEFAULT_BATCH * arguments.experts))
    batch = best_batch(rows)
    _, best_seconds = timed(lambda: incremental_pca(rows, batch))
    whole, whole_seconds = timed(lambda: PCA(components(arguments.experts), svd_solver="covariance_eigh").fit(rows))
    leading = exact[:_COMPONENTS]
    print_result(
        {
            "rows": arguments.rows,
            "experts": arguments.experts,
            "max_relative_eigenvalue_error": relative_error(eigenvalues(covariance.numpy()), exact),
            "speedup_vs_incremental_pca": default_seconds / seconds,
            "speedup_vs_incremental_pca_in_its_best_batch": best_seconds / seconds,
            "state_bytes_120b": state_bytes(*_SHAPE_120B),
            "seconds": seconds,
            "collect_seconds": collect_seconds,
            "collect_max_relative_eigenvalue_error": relative_error(eigenvalues(merged.covariance()[0, 0]), exact),
            "incremental_pca_seconds": default_seconds,
            "incremental_pca_best_batch": batch,
            "incremental_pca_best_seconds": best_seconds,
            "incremental_pca_max_relative_eigenvalue_error": relative_error(default.explained_variance_, leading),
            "in_memory_pca_seconds": whole_seconds,
            "in_memory_pca_bytes": rows.nbytes,
            "in_memory_pca_max_relative_eigenvalue_error": relative_error(whole.explained_variance_, leading),
        }
    )


def check_rows(rows: int, experts: int) -> None:
    """Refuse so few rows that their covariance has less rank than there are components to compare.

    Raises:
        ConfigError: there are too few.
    """
    least = components(experts) + 1  # the mean takes one
    if rows < least:
        raise ConfigError(
            f"--rows {rows} is too few for {components(experts)} components", f"use --rows {least} or more"
        )


def components(experts: int) -> int:
    """How many components IncrementalPCA finds."""
    return min(_COMPONENTS, experts)


def make_logits(rows: int, experts: int) -> Tensor:
    """Correlated logits with a preference for some experts, as routers give."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(experts, experts, generator=generator) * (1.5 / experts**0.5)
    preference = torch.randn(experts, generator=generator)
    logits = torch.empty(rows, experts)
    for block in logits.split(_BATCH):
        block.copy_(torch.randn(len(block), experts, generator=generator) @ mixing + preference)
    return logits


def two_pass_eigenvalues(logits: Tensor) -> NDArray[np.float64]:
    """Eigenvalues, largest first, of the sample covariance of the softmax, everything in float64."""
    rows = len(logits)
    mean = sum(torch.softmax(block.double(), -1).sum(0) for block in logits.split(_BATCH)) / rows
    total = torch.zeros(logits.shape[1], logits.shape[1], dtype=torch.float64)
    for block in logits.split(_BATCH):
        centred = torch.softmax(block.double(), -1) - mean
        total += centred.T @ centred
    return eigenvalues((total / (rows - 1)).numpy())


def eigenvalues(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Largest first."""
    return np.linalg.eigvalsh(covariance)[::-1]


def relative_error(found: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    """Largest |found - exact| / exact over the eigenvalues that are not zero."""
    kept = exact > _NEGLIGIBLE * exact[0]
    return float(np.abs(found[kept] / exact[kept] - 1).max())


def merged_moments(logits: Tensor) -> RouterMoments:
    """What `nexus-ray collect` does with the router logits of one layer."""

    def parts() -> Iterator[RouterMoments]:
        with progress("moments", len(logits)) as advance:
            for number, block in enumerate(logits.split(_BATCH)):
                valid = np.ones((1, len(block)), bool)
                yield moments_of_logits(block[None, :, None], valid, np.asarray([number % 2]), _SELECTED)
                advance(len(block))

    return reduce(RouterMoments.merge, parts(), RouterMoments.empty(1, logits.shape[1])).both_halves()


def merged_covariance(probabilities: Tensor) -> Tensor:
    """The covariance alone, from finished probabilities."""
    count, mean, total = 0, torch.zeros(probabilities.shape[1], dtype=torch.float64), torch.zeros(1)
    for block in probabilities.split(_BATCH):
        block_mean, m2 = comoments(block)
        delta, together = block_mean - mean, count + len(block)
        total = total + m2 + torch.outer(delta, delta) * (count * len(block) / together)
        mean, count = mean + delta * (len(block) / together), together
    return total / (count - 1)


def best_batch(rows: NDArray[np.float32]) -> int:
    """The batch size with which IncrementalPCA is fastest on the first rows, all of which every size reads."""
    trial = rows[:_TRIAL_ROWS]
    return min(_TRIAL_BATCHES, key=lambda batch: timed(lambda: incremental_pca(trial, batch))[1])


def incremental_pca(rows: NDArray[np.float32], batch: int) -> IncrementalPCA:
    """scikit-learn's streaming PCA over all rows, in the batches that its own `fit` takes."""
    pca = IncrementalPCA(components(rows.shape[1]))
    with progress(f"IncrementalPCA, batch {batch}", len(rows)) as advance:
        for chosen in gen_batches(len(rows), batch, min_batch_size=pca.n_components):
            pca.partial_fit(rows[chosen])
            advance(chosen.stop - chosen.start)
    return pca


def state_bytes(layers: int, experts: int) -> int:
    """Bytes of the moments of one half of the text, whatever its length."""
    return sum(values.nbytes for values in RouterMoments.empty(layers, experts).part(0).arrays().values())


def timed(work: Callable[[], ResultT]) -> tuple[ResultT, float]:
    """What `work` returns, and its seconds."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    with command_line():
        main()
