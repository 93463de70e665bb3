"""Writing a report as Markdown: the answer first, then the evidence, then what it does not show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nexus_ray.evaluation.wording import by_role, change, change_interval, duration, headline, number, size

_FEW = 30  # sequences; below it percentile intervals are known to be too narrow


def render(report: dict[str, Any], figures: dict[str, str]) -> str:
    """The report as Markdown.

    Args:
        report: as in `report.json`.
        figures: relative paths of the figures by kind: perplexity, drift, training.
    """
    sections = [
        ["# Evaluation report", headline(report["evaluation"], report["run"]["confidence"])],
        _perplexity(report, figures),
        _drift(report, figures),
        _overlay(report),
        _training(report, figures),
        _stages(report),
        _caveats(report),
    ]
    return "\n\n".join(block for section in sections for block in section) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _figure(figures: dict[str, str], kind: str, description: str) -> list[str]:
    return [f"![{description}]({figures[kind]})"] if kind in figures else []


def _perplexity(report: dict[str, Any], figures: dict[str, str]) -> list[str]:
    results = by_role(report["evaluation"])
    confidence = f"{100 * report['run']['confidence']:.4g} %"
    perplexities = _table(
        [
            "source",
            "role",
            "base perplexity",
            "student perplexity",
            "change",
            f"{confidence} CI of the change",
        ],
        [_perplexity_row(name, result) for name, result in results.items()],
    )
    rates = _table(
        ["source", "base, bits per byte", "student, bits per byte", "student - base, nats per token", "text"],
        [_rate_row(name, result) for name, result in results.items()],
    )
    note = (
        f"Perplexity is per token, on text that no other stage opens; brackets hold {confidence} confidence intervals "
        "from a paired bootstrap over sequences. The base is the same model with the shared experts switched off."
    )
    picture = _figure(figures, "perplexity", "Perplexity of base and student on every source")
    return ["## Base and student on held-out text", perplexities, note, *picture, rates]


def _perplexity_row(name: str, result: dict[str, Any]) -> list[str]:
    ratio = result["ratio"]
    models = [
        f"{number(model['token_perplexity'])} [{', '.join(map(number, model['confidence_interval']))}]"
        for model in (result["base"], result["student"])
    ]
    return [
        name,
        result["role"],
        *models,
        f"**{change(ratio['value'])}**",
        change_interval(ratio["confidence_interval"]),
    ]


def _rate_row(name: str, result: dict[str, Any]) -> list[str]:
    difference = result["nats_difference"]
    low, high = difference["confidence_interval"]
    return [
        name,
        f"{result['base']['bits_per_byte']:.3f}",
        f"{result['student']['bits_per_byte']:.3f}",
        f"{difference['value']:+.4f} [{low:+.4f}, {high:+.4f}]",
        f"{result['tokens']:,} tokens, {size(result['bytes'])}, {result['sequences']:,} sequences",
    ]


def _drift(report: dict[str, Any], figures: dict[str, str]) -> list[str]:
    rows = []
    for name, result in by_role(report["evaluation"]).items():
        drift = result["router_drift"]
        kl, l1, overlap = drift["kl"], drift["l1"], drift["top_k_overlap"]
        rows.append(
            [
                name,
                f"{_mean(kl):.4f}",
                f"{max(kl):.4f} (layer {kl.index(max(kl))})",
                f"{_mean(l1):.4f}",
                f"{100 * _mean(overlap):.1f} %",
                f"{100 * min(overlap):.1f} % (layer {overlap.index(min(overlap))})",
                *_usage_change(result["router_change"]),
            ]
        )
    header = ["source", "KL, nats", "largest KL", "L1", "same experts", "fewest same", "usage moved", "halves differ"]
    note = (
        "The routers are frozen, but their inputs move. Means over layers and tokens; KL(base || student) and L1 are "
        "between full router distributions; *same experts* is the share of the base's selected experts that the "
        "student selects too. *Usage moved* is the share of selections that went to other experts than in the base "
        "(total variation); *halves differ* is the same between two halves of the text for the base alone, for scale. "
        "Layers count from 0."
    )
    return [
        "## Router drift",
        _table(header, rows),
        note,
        *_figure(figures, "drift", "Router drift by layer"),
    ]


def _usage_change(change: dict[str, list[float | None]]) -> list[str]:
    """Means over the layers of the usage that moved, and of what two halves of the text differ by."""
    moved, halves = (
        [value for value in change[name] if value is not None] for name in ("usage_distance", "halves_distance")
    )
    return [f"{100 * _mean(moved):.1f} %", f"{100 * _mean(halves):.1f} %" if halves else "unknown"]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _overlay(report: dict[str, Any]) -> list[str]:
    overlay = report["overlay"]
    share = overlay["percent_of_base"]
    of_base = f", {share:.1f} % of the base's {size(overlay['base_bytes'])}" if share is not None else ""
    gate = "with" if overlay["token_gate"] else "without"
    text = (
        f"One shared expert of width {overlay['width']:,} in each of {overlay['layers']} layers, {gate} a gate per "
        f"token, started as `{overlay['initialisation']}`: {overlay['parameters']:,} parameters, "
        f"{size(overlay['bytes'])}{of_base}. All of them are active for every token. Base: `{report['base']['path']}` "
        f"(fingerprint `{report['base']['fingerprint'][:12]}`)."
    )
    return ["## The overlay", text, *_selection(report["selection"])]


def _selection(selection: dict[str, Any] | None) -> list[str]:
    """Which experts were selected, with what chance alone would give beside each number."""
    layers = [layer for layer in selection["layers"] if "selected" in layer] if selection else []
    if not selection or not layers:
        return []
    rows = [
        [
            str(index),
            ", ".join(map(str, layer["selected"])),
            _percent(layer.get("share")),
            _percent(layer.get("null_share")),
            _percent(layer.get("split_half_overlap")),
            _percent(layer.get("chance_overlap")),
            layer.get("verdict", "unknown"),
        ]
        for index, layer in enumerate(layers)
    ]
    header = ["layer", "experts, best first", "share of score", "no structure", "repeated", "by chance", "verdict"]
    note = (
        f"Experts selected by `{selection.get('method', 'unknown')}` on the training text. *Share of score* is what "
        "they have of their layer's score, *no structure* the same under a null model without structure; *repeated* is "
        "the share selected again from either half of the text, *by chance* what random selections have in common. "
        "selection.md says more."
    )
    return [note, _table(header, rows)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _training(report: dict[str, Any], figures: dict[str, str]) -> list[str]:
    training = report["training"]
    if training is None:
        return []
    rate = training["tokens"] / training["seconds"] if training["seconds"] else None
    rows = [
        ["optimiser steps", f"{training['steps']:,}"],
        ["tokens", f"{training['tokens']:,}"],
        ["time in steps", duration(training["seconds"]) + (f" ({rate:,.0f} tokens/s)" if rate else "")],
        ["peak learning rate", f"{training['peak_learning_rate']:.3g}"],
    ]
    if training["first_loss"] is not None and training["final_loss"] is not None:
        rows.append(
            [
                "training loss",
                f"{training['first_loss']:.4f} at the start, {training['final_loss']:.4f} at the end",
            ]
        )
    if training["best_step"] is not None:
        rows.append(
            [
                "best validation",
                f"{training['best_validation_loss']:.4f} after step {training['best_step']:,}",
            ]
        )
    if training["resumes"]:
        rows.append(["resumed after an interruption", f"{training['resumes']} x"])
    return ["## Training", _table(["", ""], rows), *_figure(figures, "training", "Training curves")]


def _stages(report: dict[str, Any]) -> list[str]:
    if not report["stages"]:
        return []
    rows = [[name, duration(seconds)] for name, seconds in report["stages"].items()]
    return ["## Time by stage", _table(["stage", "wall time"], rows)]


def _caveats(report: dict[str, Any]) -> list[str]:
    run, results = report["run"], by_role(report["evaluation"])
    texts = "; ".join(f"{name} {size(result['bytes'])}" for name, result in results.items())
    limit = run["max_sequences_per_source"]
    sampled = f" Only the first sequences of each shard were scored, at most {limit:,} a source." if limit else ""
    lines = [
        f"One training run with one seed ({run['seed']}): the intervals cover the choice of held-out text, not the "
        "luck of training. Repeat with other seeds before relying on a small difference.",
        f"Held-out text: {texts}.{sampled} Sequences of one document are not independent, so the intervals are "
        "somewhat too narrow for text with few long documents.",
        *_few_sequences(results),
        *_missing_retention(results),
        f"Context is at most {run['sequence_length']:,} tokens and starts anew with each sequence, for both models; "
        "longer contexts give lower perplexity.",
        "Perplexity measures prediction of this text. It does not measure answers, instructions or safety.",
    ]
    return ["## What this does not show", "\n".join(f"* {line}" for line in lines)]


def _few_sequences(results: dict[str, Any]) -> list[str]:
    few = [f"{name} ({result['sequences']})" for name, result in results.items() if result["sequences"] < _FEW]
    return [f"Too few sequences for a trustworthy interval: {', '.join(few)}."] if few else []


def _missing_retention(results: dict[str, Any]) -> list[str]:
    if any(result["role"] == "retention" for result in results.values()):
        return []
    return ["No retention text was scored: nothing here says what the base's other abilities paid."]
