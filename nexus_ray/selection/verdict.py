"""What the figures of a layer allow to say, in words."""

from __future__ import annotations

from dataclasses import dataclass

from nexus_ray.selection.record import NOISE, Verdict
from nexus_ray.selection.stability import Stability, overlap_p_value

_LEVEL = 0.05  # probability of calling any layer of a structureless model stable
_STABLE_OVERLAP = 0.75
CONSTANT_VARIANCE = 1e-10  # of the squared probabilities: a change of 1e-5 of a probability is rounding


@dataclass(frozen=True)
class Evidence:
    """What is known about the selection of one layer.

    Attributes:
        experts: routed experts of the layer.
        top_k: how many of them are selected.
        layers: of the model: the level of the test is divided by them (Bonferroni).
        constant: the router gives every token the same probabilities.
        identical: all experts of the layer hold the same weights.
        half_tokens: tokens of the halves.
        fewest_tokens: that a half needs.
        stability: how the halves compare; None where one is too small.
        share: of the score that the selected experts have.
        null_share: mean share under the null model.
        null_share_high: 95 % quantile of the same.
        null_name: "independent experts" or "equal experts".
    """

    experts: int
    top_k: int
    layers: int
    constant: bool
    identical: bool
    half_tokens: tuple[int, int]
    fewest_tokens: int
    stability: Stability | None
    share: float
    null_share: float
    null_share_high: float
    null_name: str


def judge(evidence: Evidence) -> tuple[Verdict, str]:
    """The verdict on a layer and the reason for it."""
    nothing_to_compare = _nothing_to_compare(evidence)
    if nothing_to_compare or evidence.stability is None:
        return NOISE, nothing_to_compare or _too_little_text(evidence)
    label = _label(evidence, evidence.stability)
    return label, f"{_agreement(evidence, evidence.stability, label)} {_concentration(evidence)}"


def _nothing_to_compare(evidence: Evidence) -> str | None:
    if evidence.constant:
        return "The router gives every token the same probabilities: they say nothing about the text."
    if evidence.identical:
        return "All experts of this layer hold the same weights: any choice gives the same shared expert."
    if evidence.top_k == evidence.experts:
        return f"Every one of the {evidence.experts} experts is selected: there is nothing to choose."
    return None


def _too_little_text(evidence: Evidence) -> str:
    first, second = evidence.half_tokens
    return (
        f"Too little text: the halves hold {first:,} and {second:,} tokens, and comparing them takes at least "
        f"{evidence.fewest_tokens:,} in each."
    )


def _label(evidence: Evidence, stability: Stability) -> Verdict:
    if stability.p_value > _LEVEL / evidence.layers:
        return NOISE
    return "stable" if stability.overlap >= _STABLE_OVERLAP else "partly stable"


def _agreement(evidence: Evidence, stability: Stability, label: Verdict) -> str:
    top_k, experts = evidence.top_k, evidence.experts
    common = round(stability.overlap * top_k)
    found = (
        f"Two halves of the text agree on {common} of {top_k} experts; random choices agree on "
        f"{top_k * top_k / experts:.1f} on average, and on at least {common} with probability {stability.p_value:.2g}"
    )
    if label != NOISE:
        return f"{found}."
    level = _LEVEL / evidence.layers
    if overlap_p_value(top_k, top_k, experts) > level:
        return f"{found}. Full agreement would not be rarer than {level:.2g} either: too few experts to tell."
    return f"{found}; only below {level:.2g} is it more than chance."


def _concentration(evidence: Evidence) -> str:
    they = f"They hold {_percent(evidence.share)} of the score"
    null = f"the best {evidence.top_k} of {evidence.null_name} hold {_percent(evidence.null_share)}"
    high = f"at most {_percent(evidence.null_share_high)} in 95 of 100 draws"
    if evidence.share > evidence.null_share_high:
        return f"{they}, more concentrated than chance: {null}, {high}."
    return f"{they}, no more concentrated than {evidence.null_name} would be: {null}, {high}."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
