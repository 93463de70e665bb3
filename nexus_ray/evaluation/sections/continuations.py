"""The report's texts to read: what base and student write after the same beginning."""

from __future__ import annotations

from typing import Any

from nexus_ray.evaluation.sections.parts import table, verbatim

_TEXTS = ("prompt", "base", "student")


def continuations(report: dict[str, Any]) -> list[str]:
    """Blocks with the greedy continuations side by side; none where there are none."""
    samples = report.get("samples")
    if not samples:
        return []
    rows = [
        [sample["source"] or "prompt", *(verbatim(sample[name]) or "*nothing*" for name in _TEXTS)]
        for sample in samples
    ]
    note = (
        "Beginnings of held-out documents, or questions of held-out conversations, continued with the most likely "
        "token each time. Examples to read, not evidence: the tables above are."
    )
    return ["## What they write", table(["source", "beginning", "base", "student"], rows), note]
