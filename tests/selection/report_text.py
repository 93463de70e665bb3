"""What the tests of the report share: its text, its tables, layers with real verdicts."""

from __future__ import annotations

from selection.synthetic_selection import (
    layer_selection,
    synthetic_statistics,
)

from nexus_ray.selection.record import LayerSelection, Selection
from nexus_ray.selection.report.report import render
from nexus_ray.selection.stability import Stability
from nexus_ray.selection.verdict import Evidence, judge_all


def table(markdown: str, heading: str, number: int = 0) -> list[list[str]]:
    """Cells of a table below a heading, its own header included."""
    section = markdown.split(f"## {heading}\n")[1].split("\n## ")[0].strip()
    blocks = [block for block in section.split("\n\n") if block.startswith("|")]
    lines = [line for line in blocks[number].strip().splitlines() if not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def render_of(selection: Selection) -> str:
    """The report with statistics of the selection's shape."""
    return render(selection, synthetic_statistics(selection))


def judged(seed: int = 0, experts: int = 16, count: int = 8, **changes: object) -> LayerSelection:
    """A layer whose verdict and reason are the real ones for some evidence."""
    evidence = {"experts": experts, "top_k": count, "layers": 2, "constant": False, "identical": False}
    texts = {"half_tokens": (2000, 2000), "fewest_tokens": 17, "stability": Stability(0.5, 0.5, 0.5)}
    shares = {"share": 0.6, "null_share": 0.6, "null_share_high": 0.65, "null_name": "independent experts"}
    (judgement,) = judge_all([Evidence(**(evidence | texts | shares | changes))])
    return layer_selection(
        seed, experts, count, verdict=judgement.verdict, cause=judgement.cause, reason=judgement.reason
    )
