"""The report on tasks of lm-eval: both models' figures, and what their difference supports."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

from nexus_ray.evaluation.sections.parts import table
from nexus_ray.evaluation.wording import Outcome

_WORDS = {
    Outcome.EQUAL: "equal",
    Outcome.BETTER: "better",
    Outcome.WORSE: "worse",
    Outcome.UNCLEAR: "no difference shown",
    None: "not judged",
}
_DIRECTIONS = {True: "higher is better", False: "lower is better", None: "no direction"}


def task_summary(report: dict[str, Any]) -> list[str]:
    """A sentence on which figures became better and which worse; none without tasks."""
    if not report.get("tasks"):
        return []
    confidence = report["run"]["confidence"]
    judged: dict[Outcome | None, list[str]] = {}
    for task, _, figure in _figures(report):
        judged.setdefault(outcome(figure, confidence), []).append(f"{task} ({_name(figure)})")
    parts = [f"{_WORDS[kind]}: {', '.join(judged[kind])}" for kind in _WORDS if kind in judged]
    return [f"Tasks of lm-eval, student against base: {'; '.join(parts)}."]


def tasks(report: dict[str, Any]) -> list[str]:
    """Blocks with a row a figure; none without tasks."""
    if not report.get("tasks"):
        return []
    confidence = report["run"]["confidence"]
    rows = [_row(task, documents, figure, confidence) for task, documents, figure in _figures(report)]
    percent = f"{100 * confidence:.4g} %"
    header = ["task", "documents", "figure", "base", "student", "student - base", f"{percent} CI", "student is"]
    note = (
        f"Computed by lm-eval {report['tasks']['lm_eval']}; +- is its standard error. The interval of the difference "
        "is a normal one, from the differences question by question; figures that are no mean over questions have none "
        f"and are not judged. Of many figures some differ by chance: {percent} intervals miss one time in "
        f"{1 / (1 - confidence):.3g}."
    )
    return ["## Tasks of lm-eval", table(header, rows), note]


def outcome(figure: dict[str, Any], confidence: float) -> Outcome | None:
    """What the interval of the difference supports; None where there is none, or no direction is better."""
    interval = difference_interval(figure, confidence)
    if interval is None or figure["higher_is_better"] is None:
        return None
    low, high = interval if figure["higher_is_better"] else (-interval[1], -interval[0])
    if low == high == 0:
        return Outcome.EQUAL
    if low > 0:
        return Outcome.BETTER
    return Outcome.WORSE if high < 0 else Outcome.UNCLEAR


def difference_interval(figure: dict[str, Any], confidence: float) -> tuple[float, float] | None:
    """Confidence interval (low, high) of the student's figure minus the base's, from its paired standard error."""
    if figure["difference"] is None or figure["difference_stderr"] is None:
        return None
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * figure["difference_stderr"]
    return figure["difference"] - reach, figure["difference"] + reach


def _figures(report: dict[str, Any]) -> Iterator[tuple[str, int | None, dict[str, Any]]]:
    for task, result in report["tasks"]["tasks"].items():
        for figure in result["figures"]:
            yield task, result["documents"], figure


def _row(task: str, documents: int | None, figure: dict[str, Any], confidence: float) -> list[str]:
    interval = difference_interval(figure, confidence)
    return [
        task,
        "-" if documents is None else f"{documents:,}",
        f"{_name(figure)}, {_DIRECTIONS[figure['higher_is_better']]}",
        _value(figure, "base"),
        _value(figure, "student"),
        "-" if figure["difference"] is None else f"{figure['difference']:+.4g}",
        "-" if interval is None else f"{interval[0]:+.4g} to {interval[1]:+.4g}",
        _WORDS[outcome(figure, confidence)],
    ]


def _name(figure: dict[str, Any]) -> str:
    return figure["metric"] if figure["filter"] == "none" else f"{figure['metric']}, {figure['filter']}"


def _value(figure: dict[str, Any], model: str) -> str:
    value, error = figure[model], figure[f"{model}_stderr"]
    shown = "-" if value is None else f"{value:.4g}"
    return shown if error is None else f"{shown} +- {error:.2g}"
