"""Perplexity of two models on the same text, and how sure one can be of the difference.

Everything is a sum over units, sequences or documents, so that results of shards add up exactly: negative
log-likelihoods in nats, predicted tokens, and the words and UTF-8 bytes that those tokens stand for. Confidence
intervals come from a paired bootstrap over units: both models are resampled together, which removes the variance that
they share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from nexus_ray.data.packing import Batch

Interval = tuple[float, float]
_IGNORED = -100
_CHUNK_BYTES = 64 << 20  # of float32 log-probabilities, or of bootstrap weights, held at one time


@dataclass(frozen=True)
class PairedLosses:
    """What base and student lose on each of the same units, sequences or documents.

    Attributes:
        base_nats: [units] negative log-likelihood of the unit's targets under the base.
        student_nats: [units] the same under the student.
        targets: [units] predicted tokens.
        num_bytes: [units] UTF-8 bytes of what is predicted.
        words: [units] words of it.
    """

    base_nats: NDArray[np.float64]
    student_nats: NDArray[np.float64]
    targets: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    words: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.targets)

    @classmethod
    def concatenate(cls, parts: Sequence[PairedLosses]) -> PairedLosses:
        """Join the units of several parts, in order; none gives an empty set."""
        nats = (np.concatenate([np.zeros(0), *columns]) for columns in _columns(parts, "base_nats", "student_nats"))
        counts = _columns(parts, "targets", "num_bytes", "words")
        return cls(*nats, *(np.concatenate([np.zeros(0, np.int64), *columns]) for columns in counts))

    def summed(self, units: NDArray[np.int64]) -> PairedLosses:
        """The sums over rows of the same unit, whose numbers are from 0 up, none left out.

        Args:
            units: [rows] the unit that each entry belongs to.
        """

        def total(values: NDArray[Any]) -> NDArray[np.float64]:
            return np.bincount(units, values).astype(np.float64)

        counts = (total(values).astype(np.int64) for values in (self.targets, self.num_bytes, self.words))
        return PairedLosses(total(self.base_nats), total(self.student_nats), *counts)

    def with_targets(self) -> PairedLosses:
        """Without the units in which nothing is predicted: they say nothing."""
        kept = self.targets > 0
        return PairedLosses(*(getattr(self, column.name)[kept] for column in fields(self)))


def _columns(parts: Sequence[PairedLosses], *names: str) -> list[list[NDArray[Any]]]:
    return [[getattr(part, name) for part in parts] for name in names]


@dataclass(frozen=True)
class Intervals:
    """Confidence intervals (low, high) of one paired comparison.

    Attributes:
        base: token perplexity of the base.
        student: token perplexity of the student.
        ratio: student perplexity over base perplexity.
        nats_difference: student minus base, nats per token.
    """

    base: Interval
    student: Interval
    ratio: Interval
    nats_difference: Interval


def sequence_nats(logits: Tensor, batch: Batch) -> NDArray[np.float64]:
    """Negative log-likelihood of each sequence's targets, in nats.

    Args:
        logits: [sequences, length, vocabulary]; position t predicts token t + 1.
        batch: the tokens; those that are no targets count nothing.

    Returns:
        [sequences] sums, taken in float64 over float32 log-softmax.
    """
    targets = np.where(batch.is_target, batch.input_ids, _IGNORED)
    ids = torch.from_numpy(targets).long().to(logits.device)
    positions = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    sums = [
        _summed_nats(logits[row, : tokens - 1], ids[row, 1:tokens], positions)
        for row, tokens in enumerate(batch.num_tokens.tolist())
    ]
    return np.asarray(torch.stack(sums).cpu().numpy())


def _summed_nats(logits: Tensor, targets: Tensor, positions: int) -> Tensor:
    """Cross-entropy summed over positions, a few positions at a time: the log-softmax is never held whole."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(0, len(targets), positions):
        part = slice(start, start + positions)
        total += (
            F.cross_entropy(logits[part].float(), targets[part], ignore_index=_IGNORED, reduction="none").double().sum()
        )
    return total


def target_bytes(batch: Batch, byte_lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """[sequences] UTF-8 bytes of the targets, given `byte_lengths` [vocabulary] of every token."""
    return np.where(batch.is_target, byte_lengths[batch.input_ids], 0).sum(axis=1)


def token_perplexity(total_nats: float, total_targets: float) -> float:
    """exp(nats / predicted tokens): what the tokens cost, each counted once whatever its sequence."""
    return math.exp(total_nats / total_targets)


def bits_per_byte(total_nats: float, total_bytes: float) -> float:
    """nats / ln 2 / UTF-8 bytes: comparable between tokenizers."""
    return total_nats / math.log(2) / total_bytes


def paired_bootstrap(losses: PairedLosses, samples: int, confidence: float, seed: int) -> Intervals:
    """Percentile bootstrap over units, base and student resampled together.

    Each sample draws as many units as there are, with replacement (Efron & Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13). It measures how the held-out text varies, not how training runs vary.

    Args:
        losses: at least two units.
        samples: bootstrap samples.
        confidence: coverage of the intervals, e.g. 0.95.
        seed: the same seed gives the same intervals.
    """
    assert len(losses) >= 2, "a bootstrap over fewer than two units says nothing"
    columns = np.stack(
        [losses.base_nats, losses.student_nats, losses.student_nats - losses.base_nats, losses.targets],
        axis=1,
    )
    sums = np.concatenate([weights @ columns for weights in _resampled_counts(len(losses), samples, seed)])
    base, student, difference = (sums[:, column] / sums[:, 3] for column in range(3))
    return Intervals(
        base=_interval(np.exp(base), confidence),
        student=_interval(np.exp(student), confidence),
        ratio=_interval(np.exp(difference), confidence),
        nats_difference=_interval(difference, confidence),
    )


def _resampled_counts(units: int, samples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each unit is drawn, [some samples, units] at a time."""
    generator = np.random.default_rng(seed)
    share = np.full(units, 1 / units)
    size = max(1, _CHUNK_BYTES // (8 * units))
    for start in range(0, samples, size):
        yield generator.multinomial(units, share, size=min(size, samples - start)).astype(np.float64)


def _interval(values: NDArray[np.float64], confidence: float) -> Interval:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
