"""What to do with a selection: the next step that its verdicts allow, in plain language."""

from __future__ import annotations

from collections.abc import Sequence

from nexus_ray.selection.methods import METHODS
from nexus_ray.selection.record import NOISE, LayerSelection, Selection

_CAUSES = {  # what the reason of a layer says -> why no text, or not this text, can settle its choice
    "hold the same weights": "identical",
    "the same probabilities": "alike",
    "nothing to choose": "all",
    "too few experts": "few",
}
_SAFE = (
    "`convert.initialisation=top1_zero` or `zero`, which start at the base's own function whichever experts were chosen"
)


def next_steps(selection: Selection) -> list[str]:
    """One or more sentences: how far to rely on the choice, then what would settle the layers where it is open."""
    open_layers: dict[str, list[int]] = {}
    for index, layer in enumerate(selection.layers):
        if layer.verdict != "stable":
            open_layers.setdefault(_cause(layer), []).append(index)
    remedies = [_remedy(cause, layers, selection) for cause, layers in sorted(open_layers.items())]
    return [_reliance(selection, set(open_layers)), *_on_shares(selection), *remedies]


def _cause(layer: LayerSelection) -> str:
    return next((cause for words, cause in _CAUSES.items() if words in layer.reason), "text")


def _reliance(selection: Selection, causes: set[str]) -> str:
    counts, layers = selection.verdicts(), len(selection.layers)
    if counts["stable"] == layers:
        return (
            "The choice repeats in every layer and can be used: `convert.initialisation=pca_topK` and `aligned_topK` "
            "start from these experts. Whether that helps is for `nexus-ray evaluate` to say: compare with "
            "`convert.initialisation=zero`."
        )
    if causes <= {"identical", "alike"} and counts[NOISE] == layers:
        return f"Nothing sets the experts apart, so the choice does not matter. Use {_SAFE}."
    if counts[NOISE] == layers:
        return f"Do not trust this choice: in no layer can it be told from chance. Use {_SAFE}."
    weak = [index for index, layer in enumerate(selection.layers) if layer.verdict != "stable"]
    reliable = f"only in {counts['stable']} of {layers} layers" if counts["stable"] else "in no layer without care"
    return f"Rely on the choice {reliable}; it is open in {layer_numbers(weak)}. When in doubt use {_SAFE}."


def _on_shares(selection: Selection) -> list[str]:
    """A warning against quoting the share of the score where the null model's is as high."""
    judged = [layer for layer in selection.layers if layer.verdict != NOISE]
    if not judged or any(layer.share > layer.null_share_high for layer in judged):
        return []
    null = METHODS[selection.method].null_name
    return [
        f"Which experts lead is repeatable, but how much of the score they hold is no evidence: {null} would hold as "
        "much in every layer."
    ]


def _remedy(cause: str, layers: Sequence[int], selection: Selection) -> str:
    where = layer_numbers(layers) if len(layers) < len(selection.layers) else "every layer"
    experts = selection.num_experts
    if cause == "identical":
        return f"The experts of {where} are copies of each other: any choice gives the same shared expert."
    if cause == "alike":
        return f"The router of {where} gives every token the same probabilities: no text can rank its experts."
    if cause == "all":
        return f"All experts of {where} are selected: lower `select.top_k` or `select.coverage` to make a choice."
    if cause == "few":
        nearer = f" `select.top_k={experts // 2}` is the easiest to judge." if experts > 2 else ""
        return f"With {experts} experts, no agreement in {where} could be told from luck, whatever the text.{nearer}"
    tokens = sum(selection.tokens.values())
    return (
        f"More text may settle {where}: raise `collect.tokens` ({tokens:,} tokens were read) to {2 * tokens:,} or "
        "more, add text if the sources are used up, then `nexus-ray run CONFIG --from collect`."
    )


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
