"""The comparison in sentences, written from the intervals alone, whoever they favour."""

from __future__ import annotations

from collections.abc import Mapping

from _comparison.statistics import Estimate

_SIDES = {"lower": "lower than {}", "higher": "higher than {}", "unsure": "not surely different from {}"}


def side_of(difference: Estimate) -> str:
    """Where the reference's loss is beside another method's, given that method's less the reference's."""
    if not difference.excludes_zero:
        return "unsure"
    return "lower" if difference.value > 0 else "higher"


def verdict(quantity: str, differences: Mapping[str, Estimate]) -> str:
    """One sentence about one loss; lower is better.

    Args:
        quantity: what was measured.
        differences: by label, another method's loss less the reference's.
    """
    sides: dict[str, list[str]] = {side: [] for side in _SIDES}
    for label, difference in differences.items():
        sides[side_of(difference)].append(label)
    parts = [words.format(_listed(sides[side])) for side, words in _SIDES.items() if sides[side]]
    return f"* **{quantity}** of the shared expert is " + "; ".join(parts) + "."


def _listed(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else ", ".join(labels[:-1]) + " and " + labels[-1]
