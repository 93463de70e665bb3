"""Writes the tables of docs/scaling.md between its markers, and draws its figure.

    python tools/scaling_page.py

Run it from the repository root after anything that changes what the scale model says; a test compares the page with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nexus_ray.planning.scale.page import page_tables, stage_of, with_tables
from nexus_ray.planning.scale.scenarios import GPUS, MODELS, TOKENS, Scenario, outcome
from nexus_ray.plot_style import legend_below, panel_rows, save, series, style
from nexus_ray.storage import write_text

ROOT = Path(__file__).parents[1]
PAGE, FIGURE = ROOT / "docs" / "scaling.md", ROOT / "docs" / "images" / "scaling.png"
HOUR = 3600


def main() -> None:
    """Write the page's tables and its figure."""
    write_text(PAGE, with_tables(PAGE.read_text(encoding="utf-8"), page_tables(ROOT / "configs")))
    draw(FIGURE)


def draw(path: Path) -> None:
    """Hours and dollars of whole runs over tokens, by number of GPUs; precompute and train over GPUs at 1 B tokens."""
    figure, rows = panel_rows([2, 2], [1.25, 1.25])
    for axes, model in zip(rows[0], MODELS, strict=True):
        style(axes, f"whole run, {model}", "tokens", "hours")
        for index, gpus in enumerate(GPUS):
            draw_line(axes, _over_tokens(model, gpus), f"{gpus} GPU{'s' if gpus > 1 else ''}", index)
    for axes, model in zip(rows[1], MODELS, strict=True):
        style(axes, f"1 B tokens, {model}", "GPUs", "hours")
        for index, stage in enumerate(("precompute", "train")):
            draw_line(axes, _over_gpus(model, stage), stage, index + len(GPUS))
    legend_below(figure, rows[0][0])
    rows[1][0].legend(frameon=False, fontsize=8.5)
    save(figure, path)


def draw_line(axes: Any, points: dict[int, float], label: str, index: int) -> None:
    """A line on logarithmic axes."""
    axes.loglog(list(points), list(points.values()), label=label, **series(index))


def _over_tokens(model: str, gpus: int) -> dict[int, float]:
    found = {tokens: outcome(Scenario(model, tokens, gpus), ROOT / "configs") for tokens in TOKENS}
    return {tokens: each.cost.seconds / HOUR for tokens, each in found.items() if "train" not in each.too_small}


def _over_gpus(model: str, stage: str) -> dict[int, float]:
    points = {}
    for power in range(10):
        found = outcome(Scenario(model, 10**9, 2**power), ROOT / "configs")
        if stage not in found.too_small:
            points[2**power] = stage_of(found.cost, stage).seconds / HOUR
    return points


if __name__ == "__main__":
    main()
