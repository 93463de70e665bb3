"""Turning a comparison into words that the confidence interval supports.

A difference is claimed only when the interval of the perplexity ratio excludes 1, "within 2 %" only when the whole
interval lies within 2 % of 1, and "at most 2 % worse" when its upper end does: an improvement is never held against a
student, however large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

_BOUNDS_PERCENT = (1, 2, 5, 10)


class Outcome(Enum):
    """How the student compares with the base on one source."""

    EQUAL = "equal"
    BETTER = "better"
    WORSE = "worse"
    UNCLEAR = "unclear"


def classify(interval: Sequence[float]) -> Outcome:
    """Outcome from the confidence interval (low, high) of the ratio student / base perplexity."""
    low, high = interval
    if low == high == 1:
        return Outcome.EQUAL
    if high < 1:
        return Outcome.BETTER
    return Outcome.WORSE if low > 1 else Outcome.UNCLEAR


def supported_bound(interval: Sequence[float]) -> int | None:
    """Smallest of 1, 2, 5, 10 percent that the whole interval of the ratio stays within; None past all."""
    return _smallest_bound(max(abs(bound - 1) for bound in interval))


def damage_bound(interval: Sequence[float]) -> int | None:
    """Smallest of 1, 2, 5, 10 percent that the perplexity rose by at most; None past all."""
    return _smallest_bound(interval[1] - 1)


def _smallest_bound(part: float) -> int | None:
    return next((bound for bound in _BOUNDS_PERCENT if part * 100 <= bound), None)


def headline(evaluation: dict[str, Any], confidence: float) -> str:
    """Did it help? A verdict in bold, then a sentence a source: the domain first, then what must not get worse.

    Args:
        evaluation: results by source, as `evaluate` returns them.
        confidence: coverage of the intervals, e.g. 0.95.
    """
    ordered = by_role(evaluation)
    sentences = [source_sentence(name, result, confidence) for name, result in ordered.items()]
    return f"**{verdict(evaluation)}** " + " ".join(sentences)


def by_role(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The same results, domain sources first."""
    return dict(sorted(evaluation.items(), key=lambda item: item[1]["role"] != "domain"))


def verdict(evaluation: dict[str, Any]) -> str:
    """One sentence over all sources: what became of the domain, and whatever became worse or better beside it."""
    return f"{_domain(_outcomes(evaluation, 'domain'))}{_beside(evaluation)}."


def _domain(outcomes: set[Outcome]) -> str:
    if not outcomes:
        return "The domain was not scored: it has no held-out text"
    if outcomes == {Outcome.EQUAL}:
        return "The student equals the base on the domain"
    if outcomes == {Outcome.BETTER}:
        return "The overlay helped on the domain"
    if outcomes == {Outcome.WORSE}:
        return "The overlay made the domain worse"
    if outcomes <= {Outcome.UNCLEAR, Outcome.EQUAL}:
        return "No difference on the domain could be shown"
    return "Mixed: the domain's sources do not agree"


def _outcomes(evaluation: dict[str, Any], role: str) -> set[Outcome]:
    results = (result for result in evaluation.values() if result["role"] == role)
    return {classify(result["ratio"]["confidence_interval"]) for result in results}


def _beside(evaluation: dict[str, Any]) -> str:
    """What retention text paid, a bounded amount or more, and what it gained, with the names of the sources."""
    retention = {name: result for name, result in evaluation.items() if result["role"] == "retention"}
    intervals = {name: result["ratio"]["confidence_interval"] for name, result in retention.items()}
    worse = {name: damage_bound(each) for name, each in intervals.items() if classify(each) is Outcome.WORSE}
    better = [name for name, each in intervals.items() if classify(each) is Outcome.BETTER]
    bounded = {name: bound for name, bound in worse.items() if bound is not None}
    unbounded = [name for name in worse if name not in bounded]
    parts = []
    if bounded:
        parts.append(f"at a cost within {max(bounded.values())} % on retention text ({', '.join(bounded)})")
    if unbounded:
        parts.append(f"and made retention text clearly worse ({', '.join(unbounded)})")
    if better:
        parts.append(f"and improved retention text ({', '.join(better)})")
    return "".join(f", {part}" for part in parts)


def source_sentence(name: str, result: dict[str, Any], confidence: float) -> str:
    """What happened to the perplexity of one source, with the interval."""
    ratio, interval = result["ratio"]["value"], result["ratio"]["confidence_interval"]
    label = f"{name} ({result['role']})"
    evidence = f"{100 * confidence:.4g} % CI {change_interval(interval)}"
    values = f"from {number(result['base']['token_perplexity'])} to {number(result['student']['token_perplexity'])}"
    outcome = classify(interval)
    if outcome is Outcome.EQUAL:
        return f"On {label} every loss equals the base's: perplexity {number(result['base']['token_perplexity'])}."
    if outcome is Outcome.UNCLEAR:
        return (
            f"On {label} no difference could be shown: perplexity {values}, {change(ratio)} "
            f"({evidence}, which includes no change){_within(interval)}."
        )
    verb = "fell" if outcome is Outcome.BETTER else "rose"
    amount = change(ratio).lstrip("+-")
    within = _within(interval) if outcome is Outcome.WORSE else ""
    return f"On {label} perplexity {verb} by {amount}, {values} ({evidence}){within}."


def _within(interval: Sequence[float]) -> str:
    """How much worse the student may be, at most; or how close it is, where that says as much."""
    damage, closeness = damage_bound(interval), supported_bound(interval)
    if damage is None:
        return "; a loss of more than 10 % is not ruled out"
    return f"; within {closeness} % of the base" if closeness == damage else f"; at most {damage} % worse"


def number(value: float) -> str:
    """A positive number with three or more significant digits, thousands separated: 1,126, 51.0, 3.21."""
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 2
    return f"{value:,.{decimals}f}"


def change(ratio: float) -> str:
    """A ratio as a signed percentage change: 0.906 is -9.4 %."""
    percent = (ratio - 1) * 100
    return f"{percent:+.1f} %" if abs(percent) >= 1 else f"{percent:+.2f} %"


def change_interval(interval: Sequence[float]) -> str:
    """An interval of ratios as percentage changes."""
    return f"{change(interval[0])} to {change(interval[1])}"


def duration(seconds: float) -> str:
    """Seconds as a person writes them: 42 s, 3 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(num_bytes: float) -> str:
    """Bytes in decimal units: 812 bytes, 3.4 MB, 1.2 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"
