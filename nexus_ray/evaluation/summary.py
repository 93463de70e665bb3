"""The numbers of one source, from what its shards' scorers returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus_ray.config import Config, EvaluateSection
from nexus_ray.errors import ArtefactError, DataError
from nexus_ray.evaluation.drift import DriftSums
from nexus_ray.evaluation.perplexity import (
    Interval,
    PairedLosses,
    bits_per_byte,
    paired_bootstrap,
    token_perplexity,
)
from nexus_ray.evaluation.routers import DIVERGED
from nexus_ray.evaluation.text_units import unit_perplexity

UNITS = {"packed": "sequence", "rolling": "document"}  # what the bootstrap resamples, by `evaluate.windows`
_LARGEST_NATS = 700.0  # per token; past it a perplexity is no finite number


def source_result(source: str, rows: Sequence[dict[str, Any]], unreadable: int, config: Config) -> dict[str, Any]:
    """Everything about one source but how its routers' moments changed.

    Args:
        source: its name.
        rows: what `PairedScorer` returned for its shards, in their order.
        unreadable: rows of text that could not be read.
        config: the run.

    Raises:
        DataError: there are fewer than two units with text.
        ArtefactError: a loss is no finite number.
    """
    losses = PairedLosses.concatenate([_losses_of(row) for row in rows]).with_targets()
    _check(source, losses, config)
    drifts = [_drift_of(row) for row in rows]
    drift = sum(drifts[1:], start=drifts[0])
    wordless = sum(int(row["wordless"]) for row in rows)
    role = config.data.sources[source].role
    numbers = summarise(losses, drift, config.evaluate, config.run.seed, has_words=not wordless)
    return {"role": role, "unreadable_rows": unreadable, "documents_without_words": wordless} | numbers


def _losses_of(row: dict[str, Any]) -> PairedLosses:
    base, student = (np.asarray(row[name], np.float64) for name in ("base_nats", "student_nats"))
    counts = (np.asarray(row[name], np.int64) for name in ("targets", "num_bytes", "words"))
    return PairedLosses(base, student, *counts)


def _drift_of(row: dict[str, Any]) -> DriftSums:
    kl, l1, overlap = (np.asarray(row[name], np.float64) for name in ("kl", "l1", "top_k_overlap"))
    return DriftSums(int(row["drift_tokens"]), kl, l1, overlap)


def _check(source: str, losses: PairedLosses, config: Config) -> None:
    if len(losses) < 2 or losses.num_bytes.sum() == 0:
        length = config.data.sequence_length
        packed = config.evaluate.windows == "packed"
        units = f"sequences of {length} tokens" if packed else "documents"
        remedy = "add held-out text or lower data.sequence_length" if packed else "add documents to it"
        raise DataError(
            f"data.sources.{source}.heldout makes {len(losses)} {units} with any to predict; "
            "at least 2 with text are needed for a confidence interval",
            f"{remedy}{'' if packed else ', or set evaluate.windows=packed'}",
        )
    _check_finite("base model", losses.base_nats, losses, source, "check the weights at model.path")
    _check_finite("student", losses.student_nats, losses, source, DIVERGED)


def _check_finite(model: str, nats: NDArray[np.float64], losses: PairedLosses, source: str, hint: str) -> None:
    worst = float((nats / losses.targets).max())
    if not worst < _LARGEST_NATS:
        raise ArtefactError(f"the {model} loses {worst} nats per token on a sequence of {source}", hint)


def summarise(
    losses: PairedLosses, drift: DriftSums, section: EvaluateSection, seed: int, *, has_words: bool = True
) -> dict[str, Any]:
    """The numbers of one source from its paired losses and router drift; all but its role."""
    intervals = paired_bootstrap(losses, section.bootstrap_samples, section.confidence, seed)
    targets = int(losses.targets.sum())
    # From the summed differences, not from two rounded means: equal losses give a ratio of exactly 1.
    difference = float((losses.student_nats - losses.base_nats).sum()) / targets
    words = int(losses.words.sum()) if has_words else None
    return {
        "unit": UNITS[section.windows],
        "units": len(losses),
        "tokens": targets,
        "words": words,
        "bytes": int(losses.num_bytes.sum()),
        "base": _model_result(losses.base_nats, losses, words, intervals.base),
        "student": _model_result(losses.student_nats, losses, words, intervals.student),
        "ratio": {"value": float(np.exp(difference)), "confidence_interval": list(intervals.ratio)},
        "nats_difference": {"value": difference, "confidence_interval": list(intervals.nats_difference)},
        "router_drift": drift.means(),
    }


def _model_result(
    nats: NDArray[np.float64], losses: PairedLosses, words: int | None, interval: Interval
) -> dict[str, Any]:
    total, targets, num_bytes = float(nats.sum()), int(losses.targets.sum()), int(losses.num_bytes.sum())
    return {
        "token_perplexity": token_perplexity(total, targets),
        "confidence_interval": list(interval),
        "word_perplexity": None if words is None else unit_perplexity(total, words),
        "byte_perplexity": unit_perplexity(total, num_bytes),
        "bits_per_byte": bits_per_byte(total, num_bytes),
        "nats_per_token": total / targets,
    }
