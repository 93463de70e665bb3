"""What to do with a selection: the next step that its verdicts allow, in plain language."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from scipy.stats import binom  # type: ignore[import-untyped]

from nexus_ray.selection.methods import METHODS
from nexus_ray.selection.record import EXCEEDED_BY_CHANCE, NOISE, Cause, LayerSelection, Selection
from nexus_ray.selection.stability import overlap_p_value

_LEVEL = 0.05  # probability of taking luck for more
_NOTHING_TO_CHOOSE: frozenset[Cause] = frozenset(("identical", "constant"))
_WITHOUT_TEXT: frozenset[Cause] = frozenset((*_NOTHING_TO_CHOOSE, "everything_selected", "too_few_experts"))
_WITH_TEXT: frozenset[Cause] = frozenset(("too_little_text", "agreement", "chance"))
_SAFE = (
    "`convert.initialisation=top1_zero` or `zero`, which start at the base's own function whichever experts were chosen"
)


def next_steps(selection: Selection) -> list[str]:
    """One or more sentences: how far to rely on the choice, then what would settle the layers where it is open."""
    open_layers = _open_layers(selection)
    remedies = [_remedy(cause, layers, selection) for cause, layers in open_layers.items() if cause in _WITHOUT_TEXT]
    causes = _WITH_TEXT | ({"too_few_experts"} if _together_could_pass(selection) else set())
    needs_text = sorted(layer for cause, layers in open_layers.items() if cause in causes for layer in layers)
    more_text = [_more_text(needs_text, selection)] if needs_text else []
    return [_reliance(selection), *_on_shares(selection), *remedies, *more_text]


def _open_layers(selection: Selection) -> dict[Cause, list[int]]:
    """Layers without a stable choice by the cause of that, in the order of the causes."""
    found: dict[Cause, list[int]] = {}
    for index, layer in enumerate(selection.layers):
        if layer.verdict != "stable":
            found.setdefault(layer.cause, []).append(index)
    return dict(sorted(found.items()))


def _reliance(selection: Selection) -> str:
    counts, layers = selection.verdicts(), len(selection.layers)
    if counts["stable"] == layers:
        return (
            "The choice repeats in every layer and can be used: `convert.initialisation=pca_topK` and `aligned_topK` "
            "start from these experts. Whether that helps is for `nexus-ray evaluate` to say: compare with "
            "`convert.initialisation=zero`."
        )
    if counts[NOISE] == layers:
        return f"{_reliance_on_noise(selection)} Use {_SAFE}."
    weak = [index for index, layer in enumerate(selection.layers) if layer.verdict != "stable"]
    reliable = f"only in {counts['stable']} of {layers} layers" if counts["stable"] else "in no layer without care"
    return f"Rely on the choice {reliable}; it is open in {layer_numbers(weak)}. When in doubt use {_SAFE}."


def _reliance_on_noise(selection: Selection) -> str:
    """What to think of a choice that is told from chance in no layer: refuted, untested, or of no matter."""
    if {layer.cause for layer in selection.layers} <= _NOTHING_TO_CHOOSE:
        return "Nothing sets the experts apart, so the choice does not matter."
    if any(layer.cause == "chance" for layer in selection.layers):
        return "Do not trust this choice: in no layer can it be told from chance."
    if _together_could_pass(selection):
        return f"Do not trust the choice of any one layer: {_together(selection)}."
    return "Whether this choice is more than chance is not known: no agreement of the halves could have shown it."


def _together_could_pass(selection: Selection) -> bool:
    """Whether halves that agree in full in all judged layers would be told from chance."""
    judged = [layer for layer in selection.layers if layer.judged]
    return bool(judged) and prod(_luck_of_full_agreement(layer, len(layer.selected)) for layer in judged) <= _LEVEL


def _together(selection: Selection) -> str:
    """What all layers say where none could have passed by itself and none is stable."""
    p_value = selection.pooled_overlap_p_value
    if p_value is not None and p_value <= _LEVEL:
        return (
            "taken together the halves agree on more experts than by luck (probability "
            f"{p_value:.2g}), but nowhere on enough of them"
        )
    return "not even all layers together can be told from chance"


def _on_shares(selection: Selection) -> list[str]:
    """A warning against quoting the share of the score where no more layers are above the null model than by luck."""
    judged = [index for index, layer in enumerate(selection.layers) if layer.judged]
    above = sum(layer.concentrated for layer in selection.layers)
    repeats = any(selection.layers[index].verdict != NOISE for index in judged)
    if not repeats or binom.sf(above - 1, len(judged), EXCEEDED_BY_CHANCE) <= _LEVEL:
        return []
    null = METHODS[selection.method].null_name
    return [
        "Which experts lead is repeatable, but how much of the score they hold is no evidence: it is above what "
        f"{null} would hold in {above} of the {len(judged)} layers judged ({layer_numbers(judged)}); luck alone gives "
        f"{selection.expected_above_null:.1f}."
    ]


def _remedy(cause: str, layers: Sequence[int], selection: Selection) -> str:
    where = _place(layers, selection)
    if cause == "identical":
        return f"The experts of {where} are copies of each other: any choice gives the same shared expert."
    if cause == "constant":
        return f"The router of {where} gives every token the same probabilities: no text can rank its experts."
    if cause == "everything_selected":
        setting = "`select.coverage`" if selection.coverage is not None else "`select.top_k`"
        return f"All experts there are to choose from in {where} are selected: lower {setting} to make a choice."
    return f"{_too_few(where, layers, selection)}{_better_count(layers, selection)}"


def _too_few(where: str, layers: Sequence[int], selection: Selection) -> str:
    counts = sorted({len(selection.layers[layer].selected) for layer in layers})
    number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return (
        f"With {number} of {selection.num_experts} experts selected, no agreement in {where} could be told from luck "
        "by itself, whatever the text."
    )


def _better_count(layers: Sequence[int], selection: Selection) -> str:
    """The number of experts nearest to the chosen one for which full agreement would pass the test of a layer."""
    count = judgeable_count([selection.layers[layer] for layer in layers], len(selection.layers))
    if count is None:
        return " No other number of experts would change that."
    setting = f"`select.top_k={count}`"
    if selection.coverage is not None:
        setting = f"`select.coverage=null` and {setting} (coverage decides how many as long as it is set)"
    return f" Full agreement would be evidence with {setting}."


def judgeable_count(layers: Sequence[LayerSelection], layers_of_model: int) -> int | None:
    """How many experts to select so that full agreement of the halves passes the test in every one of `layers`.

    The nearest to what they select, of two the smaller; None when no number would pass.

    Args:
        layers: those to judge.
        layers_of_model: the level of the test is divided by them.
    """
    experts = min(_choosable(layer) for layer in layers)
    level = _LEVEL / layers_of_model
    counts = [
        count for count in range(1, experts) if all(_luck_of_full_agreement(layer, count) <= level for layer in layers)
    ]
    selected = max(len(layer.selected) for layer in layers)
    return min(counts, key=lambda count: (abs(count - selected), count), default=None)


def _luck_of_full_agreement(layer: LayerSelection, count: int) -> float:
    """Probability that two random choices of `count` experts of a layer are the same."""
    experts = _choosable(layer)
    return overlap_p_value(count, count, experts) if count < experts else 1.0


def _choosable(layer: LayerSelection) -> int:
    """Experts of a layer that are not passed over."""
    return len(layer.ranked) - len(layer.passed_over)


def _more_text(layers: Sequence[int], selection: Selection) -> str:
    tokens = sum(selection.tokens.values())
    return (
        f"More text may settle {_place(layers, selection)}: raise `collect.tokens` ({tokens:,} tokens were read) to "
        f"{2 * tokens:,} or more, add text if the sources are used up, then `nexus-ray run CONFIG --from collect`."
    )


def _place(layers: Sequence[int], selection: Selection) -> str:
    return layer_numbers(layers) if len(layers) < len(selection.layers) else "every layer"


def layer_numbers(layers: Sequence[int]) -> str:
    """`layer 3`, or `layers 0-4, 7`: runs of neighbours are shortened."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"layer{'s' if len(layers) > 1 else ''} {text}"
