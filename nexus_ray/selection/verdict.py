"""What the figures of a layer allow to say, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nexus_ray.selection.record import NOISE, Cause, Verdict, exceeds
from nexus_ray.selection.stability import Stability, overlap_p_value, pooled_overlap_p_value

_LEVEL = 0.05  # probability of calling any layer of a structureless model stable
_STABLE_OVERLAP = 0.75
CONSTANT_VARIANCE = 1e-10  # of the squared probabilities: a change of 1e-5 of a probability is rounding


@dataclass(frozen=True)
class Evidence:
    """What is known about the selection of one layer.

    Attributes:
        experts: to choose from: routed experts of the layer, without those passed over or, where the score is a mean
            over the tokens that an expert got, without any.
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

    @property
    def level(self) -> float:
        """At most which probability of such agreement by chance lets the layer pass on its own."""
        return _LEVEL / self.layers

    @property
    def full_agreement(self) -> float:
        """Probability that random choices are the same."""
        return overlap_p_value(self.top_k, self.top_k, self.experts)

    @property
    def has_power(self) -> bool:
        """Whether full agreement would pass."""
        return self.full_agreement <= self.level


class Judgement(NamedTuple):
    """A verdict, what decided it, and the reason in plain language."""

    verdict: Verdict
    cause: Cause
    reason: str


@dataclass(frozen=True)
class Together:
    """The test of several layers at once, none of which could pass on its own.

    Attributes:
        layers: how many.
        p_value: probability that random choices agree on as many experts in all of them.
        level: at most which they pass.
    """

    layers: int
    p_value: float
    level: float

    @property
    def passed(self) -> bool:
        """Whether the layers agree on more than chance would give."""
        return self.p_value <= self.level


def judge_all(evidence: Sequence[Evidence]) -> list[Judgement]:
    """Judge each layer of a model: by itself where that can tell, else by all that it can not tell in together."""
    together = judge_together(evidence)
    return [judge(each, together) for each in evidence]


def judge_together(evidence: Sequence[Evidence]) -> Together | None:
    """Test the layers that could not pass on their own; None when there are none.

    Each layer that could has its part of the level, 0.05 / layers, and the rest is for this test, so that all tests
    of a structureless model together fail with probability 0.05 at most.
    """
    judged = [each for each in evidence if _can_be_judged(each)]
    weak = [each for each in judged if not each.has_power]
    p_value = pooled_p_value(weak)
    if p_value is None:
        return None
    return Together(len(weak), p_value, _LEVEL * (1 - (len(judged) - len(weak)) / weak[0].layers))


def pooled_p_value(evidence: Sequence[Evidence]) -> float | None:
    """Probability that random choices agree on as many experts in all layers that can be judged; None without any."""
    choices = [
        (_common(each, each.stability), each.top_k, each.experts)
        for each in evidence
        if each.stability is not None and _can_be_judged(each)
    ]
    return pooled_overlap_p_value(choices) if choices else None


def judge(evidence: Evidence, together: Together | None = None) -> Judgement:
    """The judgement on one layer.

    Args:
        evidence: about it.
        together: the test of all layers that could not pass on their own, where this is one of them.
    """
    nothing_to_compare = _nothing_to_compare(evidence)
    if nothing_to_compare:
        return nothing_to_compare
    if evidence.stability is None:
        return Judgement(NOISE, "too_little_text", _too_little_text(evidence))
    verdict, cause = _outcome(evidence, evidence.stability, together)
    agreement = _agreement(evidence, evidence.stability) + _conclusion(evidence, cause, together)
    return Judgement(verdict, cause, f"{agreement} {_concentration(evidence)}")


def _can_be_judged(evidence: Evidence) -> bool:
    return evidence.stability is not None and _nothing_to_compare(evidence) is None


def _nothing_to_compare(evidence: Evidence) -> Judgement | None:
    if evidence.constant:
        reason = "The router gives every token the same probabilities: they say nothing about the text."
        return Judgement(NOISE, "constant", reason)
    if evidence.identical:
        reason = "All experts of this layer hold the same weights: any choice gives the same shared expert."
        return Judgement(NOISE, "identical", reason)
    if evidence.top_k == evidence.experts:
        reason = f"Every one of the {evidence.experts} experts to choose from is selected: there is nothing to choose."
        return Judgement(NOISE, "everything_selected", reason)
    return None


def _too_little_text(evidence: Evidence) -> str:
    first, second = evidence.half_tokens
    return (
        f"Too little text: the halves hold {first:,} and {second:,} tokens, and comparing them takes at least "
        f"{evidence.fewest_tokens:,} in each."
    )


def _outcome(evidence: Evidence, stability: Stability, together: Together | None) -> tuple[Verdict, Cause]:
    high = stability.overlap >= _STABLE_OVERLAP
    if stability.p_value <= evidence.level:
        return ("stable" if high else "partly stable"), "agreement"
    if evidence.has_power:
        return NOISE, "chance"
    above_chance = stability.overlap > evidence.top_k / evidence.experts
    if together is not None and together.passed and high and above_chance:
        return "stable", "pooled"
    return NOISE, "too_few_experts"


def _common(evidence: Evidence, stability: Stability) -> int:
    return round(stability.overlap * evidence.top_k)


def _agreement(evidence: Evidence, stability: Stability) -> str:
    top_k, experts, common = evidence.top_k, evidence.experts, _common(evidence, stability)
    return (
        f"Two halves of the text agree on {common} of {top_k} experts; random choices agree on "
        f"{top_k * top_k / experts:.1f} on average, and on at least {common} with probability {stability.p_value:.2g}"
    )


def _alone(evidence: Evidence) -> str:
    return (
        f". Choosing {evidence.top_k} of {evidence.experts} experts, a layer alone cannot tell: full agreement would "
        f"have probability {evidence.full_agreement:.2g}, and only below {evidence.level:.2g} is it more than chance"
    )


def _conclusion(evidence: Evidence, cause: Cause, together: Together | None) -> str:
    """What follows the agreement, to the end of its sentence."""
    if cause == "agreement":
        return "."
    if cause == "chance":
        return f"; only below {evidence.level:.2g} is it more than chance."
    return f"{_alone(evidence)}.{_by_all(cause, together)}"


def _by_all(cause: Cause, together: Together | None) -> str:
    """What the layers say together that cannot tell alone."""
    if together is None:
        return ""
    these, probability = f"the {together.layers} such layers together", f"{together.p_value:.2g}"
    if cause == "pooled":
        return f" But {these} carry the test: random choices agree on as many in them with probability {probability}."
    if together.passed:
        return f" While {these} agree on more than chance (probability {probability}), this one agrees on too few."
    return f" Nor can {these}: as many in common have probability {probability} by chance, above {together.level:.2g}."


def _concentration(evidence: Evidence) -> str:
    they = f"They hold {_percent(evidence.share)} of the score"
    null = f"the best {evidence.top_k} of {evidence.null_name} hold {_percent(evidence.null_share)}"
    high = f"at most {_percent(evidence.null_share_high)} in 95 of 100 draws"
    if exceeds(evidence.share, evidence.null_share_high):
        return f"{they}, more concentrated than chance: {null}, {high}."
    return f"{they}, no more concentrated than {evidence.null_name} would be: {null}, {high}."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
