"""The report on how far the routers moved: over all tokens, and in how the experts share the work."""

from __future__ import annotations

from typing import Any

from nexus_ray.evaluation.sections.parts import figure, folded, mean, table
from nexus_ray.evaluation.wording import by_role


def router_drift(report: dict[str, Any], figures: dict[str, str]) -> list[str]:
    """Blocks on router drift: a row a source, and folded away a row a layer."""
    results = by_role(report["evaluation"])
    rows = [[name, *_summary(result)] for name, result in results.items()]
    header = [
        "source",
        "KL, nats",
        "largest KL",
        "total variation",
        "same experts",
        "fewest same",
        "load moved",
        "halves differ",
        "largest change of one expert's load",
    ]
    note = (
        "The routers are frozen unless they were trained, but their inputs move. Means over layers and tokens; "
        "KL(base || student) and total variation (half of L1) are between full router distributions; *same experts* is "
        "the share of the base's selected experts that the student selects too. *Load moved* is the share of "
        "selections that went to other experts than in the base (total variation); *halves differ* is the same between "
        "two halves of the text for the base alone, for scale. The last column is the factor by which the selections "
        "of one expert rose or fell. Layers and experts count from 0."
    )
    layers = [block for name, result in results.items() for block in _layers(name, result)]
    return ["## Router drift", table(header, rows), note, *figure(figures, "drift", "Router drift by layer"), *layers]


def _summary(result: dict[str, Any]) -> list[str]:
    drift, load = result["router_drift"], result["router_load"]
    kl, overlap = drift["kl"], drift["top_k_overlap"]
    layer = load["largest_ratio"].index(max(load["largest_ratio"]))
    return [
        f"{mean(kl):.4f}",
        f"{max(kl):.4f} (layer {kl.index(max(kl))})",
        f"{mean(drift['tv']):.4f}",
        f"{100 * mean(overlap):.1f} %",
        f"{100 * min(overlap):.1f} % (layer {overlap.index(min(overlap))})",
        *_usage_change(result["router_change"]),
        f"x {load['largest_ratio'][layer]:.2f} (layer {layer}, expert {load['expert'][layer]})",
    ]


def _usage_change(change: dict[str, list[float | None]]) -> list[str]:
    """Means over the layers of the load that moved, and of what two halves of the text differ by."""
    moved, halves = (
        [value for value in change[name] if value is not None] for name in ("usage_distance", "halves_distance")
    )
    return [f"{100 * mean(moved):.1f} %", f"{100 * mean(halves):.1f} %" if halves else "unknown"]


def _layers(name: str, result: dict[str, Any]) -> list[str]:
    drift, load = result["router_drift"], result["router_load"]
    rows = [
        [
            str(layer),
            f"{drift['kl'][layer]:.4f}",
            f"{drift['l1'][layer]:.4f}",
            f"{drift['tv'][layer]:.4f}",
            f"{100 * drift['top_k_overlap'][layer]:.1f} %",
            f"{100 * load['total_variation'][layer]:.1f} %",
            f"x {load['largest_ratio'][layer]:.2f} (expert {load['expert'][layer]})",
            f"{load['base_peak'][layer]:.2f} to {load['student_peak'][layer]:.2f}",
        ]
        for layer in range(len(drift["kl"]))
    ]
    header = ["layer", "KL", "L1", "TV", "same experts", "load moved", "largest change", "busiest expert, x even share"]
    return folded(f"{name}, layer by layer", table(header, rows))
