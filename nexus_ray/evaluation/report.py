"""The report of a run: `report.json` for programs, `report.md` for people, the figures beside them.

Everything in it is read from the run's own artefacts; what an earlier stage did not leave is left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from nexus_ray import plots
from nexus_ray.checkpoints.overlay import load_overlay_config
from nexus_ray.checkpoints.reader import checkpoint_bytes
from nexus_ray.config import STAGES, Config
from nexus_ray.evaluation import wording
from nexus_ray.evaluation.markdown import render
from nexus_ray.layout import RunLayout
from nexus_ray.storage import Place, file_sizes, read_text, write_json, write_text
from nexus_ray.training.watching.metrics import read_metrics

FORMAT_VERSION = 1
_SELECTION_KEYS = ("method", "top_k", "num_experts", "sources")
_LAYER_KEYS = ("selected", "share", "null_share", "split_half_overlap", "chance_overlap", "verdict")


def evaluate_and_report(config: Config, layout: RunLayout) -> dict[str, Any]:
    """The evaluate stage: score base and student, then write the report; see `evaluate` and `write_report`."""
    from nexus_ray.evaluation.evaluate import evaluate

    started = time.monotonic()
    found = evaluate(config, layout)
    seconds = round(time.monotonic() - started, 2)
    return write_report(config, layout, found.sources, seconds, samples=found.samples, tasks=found.tasks)


def write_report(
    config: Config,
    layout: RunLayout,
    evaluation: dict[str, Any],
    seconds: float | None = None,
    *,
    samples: Sequence[dict[str, Any]] = (),
    tasks: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Draw the figures and write `report.json` and `report.md`.

    Args:
        config: the run.
        layout: where its artefacts are.
        evaluation: results by source, as `Evaluation.sources` holds them.
        seconds: how long that took.
        samples: greedy continuations, as `Evaluation.samples` holds them.
        tasks: of lm-eval, as `Evaluation.tasks` holds them.

    Returns:
        The report, as in `report.json`.

    Raises:
        ArtefactError: the overlay's description is missing or damaged.
        StorageError: the file system refused.
    """
    report = build_report(config, layout, evaluation, seconds) | {"samples": list(samples), "tasks": tasks}
    figures = _draw(layout, evaluation)
    write_text(layout.report.with_suffix(".md"), render(report, figures))
    write_json(layout.report, report)
    return report


def build_report(
    config: Config, layout: RunLayout, evaluation: dict[str, Any], seconds: float | None = None
) -> dict[str, Any]:
    """The report as a JSON-serialisable dictionary; see `write_report`."""
    overlay = _overlay(config, layout)
    return {
        "format_version": FORMAT_VERSION,
        "run": {
            "directory": str(config.run.directory),
            "seed": config.run.seed,
            "sequence_length": config.data.sequence_length,
            "confidence": config.evaluate.confidence,
            "bootstrap_samples": config.evaluate.bootstrap_samples,
            "max_sequences_per_source": config.evaluate.max_sequences_per_source,
            "windows": config.evaluate.windows,
            "stride": config.evaluate.stride,
        },
        "base": {"path": str(config.model.path), "fingerprint": overlay["base_fingerprint"]},
        "overlay": overlay,
        "evaluation": evaluation,
        "training": summarise_training(read_metrics(layout.metrics)),
        "stages": _stage_seconds(layout.stages, seconds),
        "selection": _short_selection(layout.selection),
    }


def console_table(report: dict[str, Any]) -> Table:
    """Base against student on every source; 80 columns wide and plain characters, for logs as for terminals."""
    confidence = f"{100 * report['run']['confidence']:.4g} % CI"
    verdict = wording.verdict(report["evaluation"])
    table = Table(box=box.ASCII2, title="held-out token perplexity", caption=verdict)
    for heading in ("source", "role"):
        table.add_column(heading, overflow="fold")
    for heading in ("base", "student", "change", confidence):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in wording.by_role(report["evaluation"]).items():
        ratio = result["ratio"]
        table.add_row(
            escape(name),
            result["role"],
            wording.number(result["base"]["token_perplexity"]),
            wording.number(result["student"]["token_perplexity"]),
            wording.change(ratio["value"]),
            wording.change_interval(ratio["confidence_interval"]),
        )
    return table


def summarise_training(metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Totals of a training run from its metrics; None when there are no training steps.

    Step numbers count finished optimiser steps; `seconds` is the time spent in steps, without validation.
    """
    steps = [record for record in metrics if record.get("event") == "step"]
    if not steps:
        return None
    best = _best_validation(metrics)
    return {
        "steps": len({record["step"] for record in steps}),
        "tokens": int(_total(steps, "tokens")),
        "seconds": _total(steps, "seconds"),
        "first_loss": steps[0].get("loss"),
        "final_loss": steps[-1].get("loss"),
        "peak_learning_rate": max((record.get("learning_rate", 0.0) for record in steps), default=0.0),
        "best_step": best["step"] + 1 if best else None,
        "best_validation_loss": best.get("loss") if best else None,
        "resumes": sum(record.get("event") == "resume" for record in metrics),
    }


def _total(records: Iterable[dict[str, Any]], key: str) -> float:
    return float(sum(record.get(key, 0) for record in records))


def _best_validation(metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The validation with the lowest loss: the checkpoint that became the overlay."""
    scored = [record for record in metrics if record.get("event") == "validation" and record.get("loss") is not None]
    return min(scored, key=lambda record: record["loss"], default=None)


def _overlay(config: Config, layout: RunLayout) -> dict[str, Any]:
    description = load_overlay_config(layout.overlay)
    num_bytes, base_bytes = _tensor_bytes(layout.overlay), checkpoint_bytes(config.model.path)
    return description.model_dump() | {
        "path": str(layout.overlay),
        "parameters": description.parameters,
        "bytes": num_bytes,
        "base_bytes": base_bytes,
        "percent_of_base": 100 * num_bytes / base_bytes if base_bytes else None,
    }


def _tensor_bytes(directory: Place) -> int:
    return sum(
        size for name, size in file_sizes(directory).items() if fnmatch(name, "*.safetensors") and "/" not in name
    )


def _stage_seconds(directory: Place, evaluation_seconds: float | None) -> dict[str, float]:
    """{stage: seconds} of the stages that left a record, in pipeline order; this evaluation's own time is given."""
    seconds = {name: _read_object(directory / f"{name}.json").get("seconds") for name in STAGES}
    seconds["evaluate"] = evaluation_seconds
    return {name: float(value) for name, value in seconds.items() if isinstance(value, (int, float))}


def _short_selection(path: Place) -> dict[str, Any] | None:
    """How experts were selected and which, without the scores; None when there is no selection."""
    selection = _read_object(path)
    if not selection:
        return None
    layers = [_only(layer, _LAYER_KEYS) for layer in selection.get("layers", ())]
    return _only(selection, _SELECTION_KEYS) | {"layers": layers}


def _only(values: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}


def _read_object(path: Place) -> dict[str, Any]:
    """A JSON object, empty when the file is missing or something else: the report does without it."""
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _draw(layout: RunLayout, evaluation: dict[str, Any]) -> dict[str, str]:
    """Draw the figures that there is data for; {kind: path relative to the run directory}."""
    metrics = read_metrics(layout.metrics)
    plots.plot_perplexity(evaluation, layout.plots / "perplexity.png")
    plots.plot_drift(evaluation, layout.plots / "router_drift.png")
    figures = {"perplexity": "plots/perplexity.png", "drift": "plots/router_drift.png"}
    if any(record.get("event") == "step" for record in metrics):
        plots.plot_training(metrics, layout.plots / "training.png")
        figures["training"] = "plots/training.png"
    return figures
