"""The report on how well both models predict the held-out text."""

from __future__ import annotations

from typing import Any

from nexus_ray.evaluation.sections.parts import figure, table
from nexus_ray.evaluation.wording import by_role, change, change_interval, number, size


def perplexity(report: dict[str, Any], figures: dict[str, str]) -> list[str]:
    """Blocks on perplexity, per token with intervals, per word and per byte without."""
    results = by_role(report["evaluation"])
    confidence = f"{100 * report['run']['confidence']:.4g} %"
    header = ["source", "role", "base perplexity", "student perplexity", "change", f"{confidence} CI of the change"]
    perplexities = table(header, [_perplexity_row(name, result) for name, result in results.items()])
    header = [
        "source",
        "word perplexity, base to student",
        "byte perplexity",
        "bits per byte",
        "student - base, nats per token",
        "text",
    ]
    rates = table(header, [_rate_row(name, result) for name, result in results.items()])
    unit = next(iter(results.values()))["unit"]
    note = (
        f"Perplexity is per token, on text that no other stage opens; brackets hold {confidence} confidence intervals "
        f"from a paired bootstrap over {unit}s. The base is the same model with the shared experts switched off. "
        f"{_windows(report['run'])}"
    )
    picture = figure(figures, "perplexity", "Perplexity of base and student on every source")
    return ["## Base and student on held-out text", perplexities, note, *picture, rates, _units(results)]


def _windows(run: dict[str, Any]) -> str:
    length = f"{run['sequence_length']:,} tokens"
    if run["windows"] == "packed":
        return f"Documents are joined by a separator, which is predicted too, and cut into sequences of {length}."
    stride = run["stride"] or run["sequence_length"]
    return f"Each document stands alone, in rolling windows of {length} that score {stride:,} each, as in lm-eval."


def _units(results: dict[str, Any]) -> str:
    """What words and bytes are of, and where the words are not known."""
    without = [name for name, result in results.items() if result["words"] is None]
    unknown = f" Words are not known where there are conversations: {', '.join(without)}." if without else ""
    return f"Words (between whitespace) and UTF-8 bytes are those of the text before the tokenizer.{unknown}"


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
    words = "" if result["words"] is None else f"{result['words']:,} words, "
    return [
        name,
        _both(result, "word_perplexity"),
        _both(result, "byte_perplexity"),
        " to ".join(f"{result[model]['bits_per_byte']:.3f}" for model in ("base", "student")),
        f"{difference['value']:+.4f} [{low:+.4f}, {high:+.4f}]",
        f"{result['tokens']:,} tokens, {words}{size(result['bytes'])}, {result['units']:,} {result['unit']}s",
    ]


def _both(result: dict[str, Any], figure_name: str) -> str:
    values = [result[model][figure_name] for model in ("base", "student")]
    return "-" if None in values else " to ".join(number(value) for value in values)
