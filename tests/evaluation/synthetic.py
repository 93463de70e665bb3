"""Evaluations that no model made, for tests of what is written and drawn about them."""

from __future__ import annotations

import math
from typing import Any


def source_result(
    role: str, base: float, student: float, interval: tuple[float, float], *, layers: int = 4, units: int = 250
) -> dict[str, Any]:
    """What `evaluate` says about one source, with `interval` around the ratio of the perplexities."""
    drift = 0.0 if base == student else 0.01

    def model(value: float) -> dict[str, Any]:
        return {
            "token_perplexity": value,
            "confidence_interval": [0.96 * value, 1.04 * value],
            "word_perplexity": value**1.4,
            "byte_perplexity": value**0.25,
            "bits_per_byte": math.log2(value) / 4,
            "nats_per_token": math.log(value),
        }

    return {
        "role": role,
        "unreadable_rows": 0,
        "documents_without_words": 0,
        "unit": "sequence",
        "units": units,
        "tokens": 64_000,
        "words": 46_000,
        "bytes": 257_749,
        "base": model(base),
        "student": model(student),
        "ratio": {"value": student / base, "confidence_interval": list(interval)},
        "nats_difference": {
            "value": math.log(student / base),
            "confidence_interval": [math.log(bound) for bound in interval],
        },
        "router_drift": {
            "kl": [drift * (layer + 1) for layer in range(layers)],
            "l1": [2 * drift * (layer + 1) for layer in range(layers)],
            "tv": [drift * (layer + 1) for layer in range(layers)],
            "top_k_overlap": [1 - drift * (layer + 1) for layer in range(layers)],
        },
        "router_load": {
            "total_variation": [drift * (layer + 1) for layer in range(layers)],
            "largest_ratio": [1 + 5 * drift * (layer + 1) for layer in range(layers)],
            "expert": [layer % 3 for layer in range(layers)],
            "base_peak": [1.4] * layers,
            "student_peak": [1.4 + drift] * layers,
        },
        "router_change": {
            "usage_distance": [drift * (layer + 1) for layer in range(layers)],
            "probability_distance": [drift] * layers,
            "covariance_distance": [drift] * layers,
            "halves_distance": [0.02, *[None] * (layers - 1)],
        },
    }


def evaluation(
    domain: tuple[float, float, tuple[float, float]], retention: tuple[float, float, tuple[float, float]]
) -> dict[str, Any]:
    """An evaluation of `prose` (retention) and `play` (domain), each (base, student, interval of the ratio)."""
    return {"prose": source_result("retention", *retention), "play": source_result("domain", *domain)}


def training_records(steps: int = 40, *, kl: bool = True, resumed: bool = True) -> list[dict[str, Any]]:
    """Metrics of a training run as `metrics.jsonl` holds them."""
    records: list[dict[str, Any]] = []
    for step in range(steps):
        cross_entropy = 4 + 3 * math.exp(-step / 10) + 0.1 * math.sin(7 * step)
        parts = {"cross_entropy": cross_entropy, **({"output_kl": 0.02 * step / steps} if kl else {})}
        record = {"loss": sum(parts.values()), **parts, "gradient_norm": 1.5, "learning_rate": 1e-2, "tokens": 512}
        records.append({"event": "step", "step": step, **record, "seconds": 0.5})
        if (step + 1) % 10 == 0:
            loss = 4.2 + abs(step - 29) / 100
            records.append({"event": "validation", "step": step, "loss": loss, "losses": {"play": loss, "prose": 3.1}})
            records.append({"event": "checkpoint", "step": step})
        if resumed and step == 14:
            records.append({"event": "resume", "step": 15})
    return records
