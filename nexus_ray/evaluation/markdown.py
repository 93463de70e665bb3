"""Writing a report as Markdown: the answer first, then the evidence, then what it does not show."""

from __future__ import annotations

from typing import Any

from nexus_ray.evaluation.sections.continuations import continuations
from nexus_ray.evaluation.sections.parts import figure, table
from nexus_ray.evaluation.sections.perplexity import perplexity
from nexus_ray.evaluation.sections.routers import router_drift
from nexus_ray.evaluation.sections.tasks import task_summary, tasks
from nexus_ray.evaluation.wording import by_role, duration, headline, size

_FEW = 30  # units; below it percentile intervals are known to be too narrow


def render(report: dict[str, Any], figures: dict[str, str]) -> str:
    """The report as Markdown.

    Args:
        report: as in `report.json`.
        figures: relative paths of the figures by kind: perplexity, drift, training.
    """
    sections = [
        ["# Evaluation report", headline(report["evaluation"], report["run"]["confidence"]), *task_summary(report)],
        perplexity(report, figures),
        tasks(report),
        continuations(report),
        router_drift(report, figures),
        _overlay(report),
        _training(report, figures),
        _stages(report),
        _caveats(report),
    ]
    return "\n\n".join(block for section in sections for block in section) + "\n"


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
    return [note, table(header, rows)]


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
    return ["## Training", table(["", ""], rows), *figure(figures, "training", "Training curves")]


def _stages(report: dict[str, Any]) -> list[str]:
    if not report["stages"]:
        return []
    rows = [[name, duration(seconds)] for name, seconds in report["stages"].items()]
    return ["## Time by stage", table(["stage", "wall time"], rows)]


def _caveats(report: dict[str, Any]) -> list[str]:
    run, results = report["run"], by_role(report["evaluation"])
    texts = "; ".join(f"{name} {size(result['bytes'])}" for name, result in results.items())
    limit = run["max_sequences_per_source"]
    unit = next(iter(results.values()))["unit"]
    sampled = f" Only the first {unit}s of each shard were scored, at most {limit:,} a source." if limit else ""
    lines = [
        f"One training run with one seed ({run['seed']}): the intervals cover the choice of held-out text, not the "
        "luck of training. Repeat with other seeds before relying on a small difference.",
        f"Held-out text: {texts}.{sampled}{_dependence(unit)}",
        *_few_units(results),
        *_missing_retention(results),
        f"Context is at most {run['sequence_length']:,} tokens and {_context(run)}, for both models; "
        "longer contexts give lower perplexity.",
        "Perplexity measures prediction of this text. It does not measure answers, instructions or safety.",
    ]
    return ["## What this does not show", "\n".join(f"* {line}" for line in lines)]


def _dependence(unit: str) -> str:
    """Why intervals over parts of documents are too narrow; documents themselves are as independent as text gets."""
    if unit == "document":
        return ""
    return (
        " Sequences of one document are not independent, so the intervals are somewhat too narrow for text with few "
        "long documents."
    )


def _context(run: dict[str, Any]) -> str:
    if run["windows"] == "packed":
        return "starts anew with each sequence"
    least = run["sequence_length"] - (run["stride"] or run["sequence_length"]) + 1
    return f"at least {least:,} after the first window of a document"


def _few_units(results: dict[str, Any]) -> list[str]:
    counts = {name: (result["units"], result["unit"]) for name, result in results.items()}
    few = [f"{name} ({units} {unit}s)" for name, (units, unit) in counts.items() if units < _FEW]
    return [f"Too few for a trustworthy interval: {', '.join(few)}."] if few else []


def _missing_retention(results: dict[str, Any]) -> list[str]:
    if any(result["role"] == "retention" for result in results.values()):
        return []
    return ["No retention text was scored: nothing here says what the base's other abilities paid."]
