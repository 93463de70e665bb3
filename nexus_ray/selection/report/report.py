"""The report of an expert selection as Markdown: what to do first, then the evidence with chance beside it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from nexus_ray.data.coverage import CalibrationSample
from nexus_ray.router.artefact import RouterStatistics
from nexus_ray.selection.methods import METHODS
from nexus_ray.selection.record import VERDICTS, LayerSelection, Selection
from nexus_ray.selection.report.advice import layer_numbers, next_steps
from nexus_ray.selection.report.sources import (
    Comparison,
    Pairwise,
    compare_sources,
    exclusive_experts,
    ordered_sources,
    share_of_selections,
    texts_of_their_own,
)
from nexus_ray.storage import Place, exists, write_text

_MOST_EXPERTS_LISTED = 8
_CAPTIONS = {
    "expert_importance.png": "Importance of every expert, pale up to the even share; the selected ones have a frame.",
    "selection_stability.png": "Agreement of two halves of the text, and the share of the score, beside chance.",
    "expert_usage.png": "How often the router sends each source to each expert, pale up to the even share.",
    "co_selection.png": "Pairs of experts chosen together more (blue) or less (orange) often than by popularity alone; "
    "grey: too few pairs to tell.",
    "concentration.png": "Share of the score held by the best experts, beside the null model.",
    "router_variance.png": "Principal components of the router probabilities, beside independent experts.",
}
_NULLS = {
    "independent experts": "experts whose probabilities vary as much as here but independently of each other",
    "equal experts": "experts that are all equally good, with the noise that the two halves of the text show",
}
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e[-+]?\d+)?")


def write_report(selection: Selection, statistics: RouterStatistics, path: Place, plots_directory: Place) -> None:
    """Write the report, with those figures that are in `plots_directory`, atomically.

    Raises:
        StorageError: the file system refused.
    """
    figures = {
        name: Path(os.path.relpath(str(plots_directory / name), str(path.parent))).as_posix()
        for name in _CAPTIONS
        if exists(plots_directory / name)
    }
    write_text(path, render(selection, statistics, figures))


def render(selection: Selection, statistics: RouterStatistics, figures: Mapping[str, str] | None = None) -> str:
    """The report as Markdown.

    Args:
        selection: what to report.
        statistics: that it was made from; they say how far the use of experts differs between texts.
        figures: relative paths of the figures by file name; those that are not known are left out.
    """
    figures = figures or {}
    sections = [
        ["# Expert selection", f"**{selection.summary()}**", *next_steps(selection)],
        _layers(selection, figures),
        _serving(selection, compare_sources(selection, statistics), figures),
        _calibration(selection),
        _distribution(selection, figures),
        _reading(selection),
    ]
    return "\n\n".join(block for section in sections for block in section) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _figure(figures: Mapping[str, str], name: str) -> list[str]:
    if name not in figures:
        return []
    title = Path(name).stem.replace("_", " ")
    return [f"![{title}]({quote(figures[name])})", f"*{_CAPTIONS[name]}*"]


def _percent(share: float | None) -> str:
    return "-" if share is None or np.isnan(share) else f"{100 * share:.0f} %"


def _experts(experts: Sequence[int], marked: set[int] | None = None) -> str:
    """The first few experts, those in `marked` bold, and how many more there are."""
    shown = [f"**{expert}**" if marked and expert in marked else str(expert) for expert in experts]
    more = len(shown) - _MOST_EXPERTS_LISTED
    return ", ".join(shown[:_MOST_EXPERTS_LISTED]) + (f" +{more}" if more > 0 else "")


def _layers(selection: Selection, figures: Mapping[str, str]) -> list[str]:
    header = ["layer", "experts, best first", "share / null (95 %)", "held-out share", "overlap / chance", "verdict"]
    rows = [_layer_row(index, layer) for index, layer in enumerate(selection.layers)]
    if any(layer.passed_over for layer in selection.layers):
        header.append("passed over")
        rows = [[*row, _experts(layer.passed_over) or "-"] for row, layer in zip(rows, selection.layers, strict=True)]
    pictures = [*_figure(figures, "expert_importance.png"), *_figure(figures, "selection_stability.png")]
    return ["## Layers", _table(header, rows), *_reasons(selection), *pictures]


def _layer_row(index: int, layer: LayerSelection) -> list[str]:
    shares = f"{_percent(layer.share)} / {_percent(layer.null_share)} ({_percent(layer.null_share_high)})"
    figures = [
        shares,
        _percent(layer.held_out_share),
        f"{_percent(layer.split_half_overlap)} / {_percent(layer.chance_overlap)}",
    ]
    if layer.cause == "identical":
        figures = ["-"] * len(figures)
    return [str(index), _experts(layer.selected), *figures, layer.verdict]


def _reasons(selection: Selection) -> list[str]:
    """A line for all layers whose reasons differ in their numbers only, the best verdict first."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for index, layer in enumerate(selection.layers):
        kinds.setdefault((layer.verdict, _NUMBER.sub("#", layer.reason)), []).append(index)
    ordered = sorted(kinds.items(), key=lambda kind: VERDICTS.index(selection.layers[kind[1][0]].verdict))
    return ["\n".join(f"* **{verdict}**, {_reason(selection, layers)}" for (verdict, _), layers in ordered)]


def _reason(selection: Selection, indices: Sequence[int]) -> str:
    """The reason these layers share, or that of the weakest of them."""
    reasons = {selection.layers[index].reason for index in indices}
    if len(reasons) == 1:
        return f"{layer_numbers(indices)}: {reasons.pop()}"
    weakest = min(indices, key=lambda index: _strength(selection.layers[index]))
    return f"{layer_numbers(indices)}. The weakest of them is layer {weakest}: {selection.layers[weakest].reason}"


def _strength(layer: LayerSelection) -> tuple[float, float]:
    return layer.split_half_overlap or 0.0, layer.share - layer.null_share_high


def _serving(selection: Selection, comparisons: Sequence[Comparison], figures: Mapping[str, str]) -> list[str]:
    names = ordered_sources(selection)
    own = texts_of_their_own(comparisons)
    rows = [[str(index), *(_use(layer, name, own) for name in names)] for index, layer in enumerate(selection.layers)]
    bold = " Bold: in the list of this source only, where it uses experts differently from all others." if own else ""
    note = (
        "The most used experts of each source by itself, as many as the layer selects; in brackets the share of the "
        f"source's selections that they take, and the overlap of the lists from its two halves.{bold}"
    )
    pictures = [*_figure(figures, "expert_usage.png"), *_figure(figures, "co_selection.png")]
    lists = [note, _table(["layer", *names], rows)]
    return ["## Which experts serve which text", *_comparisons(comparisons, selection), *lists, *pictures]


def _use(layer: LayerSelection, source: str, own: Collection[str]) -> str:
    use = layer.by_source[source]
    shares = f"{_percent(share_of_selections(layer, source))}; {_percent(use.split_half_overlap)}"
    return f"{_experts(use.selected, exclusive_experts(layer) if source in own else set())} ({shares})"


def _comparisons(comparisons: Sequence[Comparison], selection: Selection) -> list[str]:
    if not comparisons:
        return ["Only one source was collected: there is no other text to compare its experts with."]
    header = ["texts", "same experts (halves)", "selections that differ (halves)", "layers apart", "by luck", "p"]
    header.append("other experts?")
    random = _percent(_mean([layer.chance_overlap for layer in selection.layers]))
    note = (
        "*Same experts*: what the lists below have in common; random lists have "
        f"{random}. *Selections that differ*: the part of the router's selections that goes to other experts. In "
        "brackets the same between the two halves of the first text and of the second, all as means over layers. "
        "*Layers apart*: where the texts differ in at least twice as many selections as the halves of either; *by "
        "luck* is the most of them to expect for texts of one kind, and *p* bounds the probability of as many (sign "
        "test over layers; *yes* from 0.05 down). *Not shown* is no proof that the texts use the same experts."
    )
    return [_table(header, [_comparison_row(pair) for pair in comparisons]), note]


def _comparison_row(pair: Comparison) -> list[str]:
    counts = ["-"] * 3
    if pair.known_layers:
        counts = [f"{pair.apart_layers} of {pair.known_layers}", f"at most {pair.luck_layers:g}", f"{pair.p_value:.2g}"]
    return [", ".join(pair.names), _pairwise(pair.overlap), _pairwise(pair.distance), *counts, f"**{pair.conclusion}**"]


def _pairwise(figure: Pairwise) -> str:
    between, first, second = (_percent(_mean(values)) for values in (figure.between, figure.first, figure.second))
    return f"{between} ({first}, {second})"


def _mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN when there are none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _calibration(selection: Selection) -> list[str]:
    rows = [
        _calibration_row(name, selection.calibration.get(name), selection.tokens[name])
        for name in ordered_sources(selection)
    ]
    header = ["source", "method", "candidates", "sequences", "tokens", "distinct", "x random", "x reference"]
    note = (
        "The text that the statistics were collected from. *x random* and *x reference* compare its coverage of the "
        "vocabulary (the sum over tokens of the square root of their count) with random choice and with the "
        "reference system's score, at the same number of tokens."
    )
    return ["## Calibration text", _table(header, rows), note]


def _calibration_row(name: str, sample: CalibrationSample | None, tokens: int) -> list[str]:
    if sample is None:
        return [name, "not recorded", "-", "-", f"{tokens:,}", "-", "-", "-"]
    counts = (sample.candidates, sample.sequences, sample.tokens, sample.distinct_tokens)
    ratios = [_ratio(sample.coverage, other) for other in (sample.random_coverage, sample.reference_coverage)]
    return [name, sample.method, *(f"{count:,}" for count in counts), *ratios]


def _ratio(value: float, other: float) -> str:
    return f"{value / other:.3f}" if other > 0 else "-"


def _distribution(selection: Selection, figures: Mapping[str, str]) -> list[str]:
    pictures = [*_figure(figures, "concentration.png"), *_figure(figures, "router_variance.png")]
    layers = [layer for layer in selection.layers if layer.cause != "identical"]
    if not layers:
        words = ["All experts of a layer hold the same weights: how the score is spread over them means nothing."]
    else:
        words = _spread(layers, METHODS[selection.method].null_name)
    return ["## Distribution of the score", *words, *pictures]


def _spread(layers: Sequence[LayerSelection], null_name: str) -> list[str]:
    """How the score is spread over the experts of these layers, on average."""
    experts = len(layers[0].ranked)
    rows = []
    for count in layers[0].distribution.top_fractions:
        measured = _mean([layer.distribution.top_fractions[count] for layer in layers])
        null = _mean([layer.null_curve[int(count) - 1] for layer in layers])
        rows.append([f"best {count}", _percent(measured), _percent(null), _percent(int(count) / experts)])
    table = [_table(["share of the score", "measured", null_name, "same score each"], rows)] if rows else []
    effective = _mean([layer.distribution.effective_experts for layer in layers])
    note = (
        f"Means over layers. Pattern: {_patterns([layer.distribution.pattern for layer in layers])}; under "
        f"the null model: {_patterns([layer.distribution.null_pattern for layer in layers])}. "
        f"The score is spread as if over {effective:.1f} equal experts of {experts}."
    )
    return [*table, note]


def _patterns(labels: Sequence[str]) -> str:
    counts = Counter(labels).most_common()
    return ", ".join(f"{label} in {count}" for label, count in counts) + f" of {len(labels)} layers"


def _reading(selection: Selection) -> list[str]:
    by_coverage = any(sample.method == "coverage" for sample in selection.calibration.values())
    rare = (
        " Sequences chosen for coverage over-represent rare tokens, so the shares are those of this sample, not "
        "of the text as people write it."
    )
    chosen = ", chosen for coverage as here" if by_coverage else ""
    null = _NULLS[METHODS[selection.method].null_name]
    return [
        "## How to read the numbers",
        f"*Null* is what {null} would give: a share that is not above it says nothing, and one layer in twenty is "
        "above the 95 % bound by luck. *Held-out share* scores the experts chosen on one half of the text on the other "
        f"half, so it does not flatter the choice.{rare if by_coverage else ''}",
        "*Overlap* is between two halves of the same sources, which have at most one document in common. A stable "
        f"choice repeats on other text of this kind{chosen}. It does not mean that training from it is better.",
    ]
