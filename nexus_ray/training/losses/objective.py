"""The training objective: which losses a source enters with, and how token sums become one number.

Each term is a mean over the positions of the global batch of the sources that have it, weighted per source:
sum over positions of (source weight * loss) / number of positions of sources with the term. Terms about next tokens
count tokens in the loss mask; the router KL counts positions that have router targets; what keeps routers in shape
counts all tokens. Nothing else enters the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_ray.config import LOSSES, TrainSection, TrainSourceSection
from nexus_ray.targets.reading.reader import TargetBatch
from nexus_ray.targets.teacher import HiddenTargets
from nexus_ray.training.losses.chunked import NEXT_TOKEN_TERMS, output_losses
from nexus_ray.training.losses.divergences import Form
from nexus_ray.training.losses.routers import load_balancing, router_kl, router_z

HIDDEN_MSE = "hidden_mse"
ROUTER_KL = "router_kl"
OF_TOKENS = ("load_balancing", "router_z")
TERMS = LOSSES


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one source, with what the teacher said about them.

    Attributes:
        source: name of the source.
        batch: its sequences and targets.
    """

    source: str
    batch: TargetBatch


@dataclass(frozen=True)
class Output:
    """What the student says about a micro-batch.

    Attributes:
        hidden: [B, T, hidden] final hidden states.
        router_logits: [B, T, layers, experts].
        head: [vocabulary, hidden] weight of its LM head.
        experts_per_token: experts that a router selects.
    """

    hidden: Tensor
    router_logits: Tensor
    head: Tensor
    experts_per_token: int


@dataclass(frozen=True)
class Objective:
    """The objective at one moment of the run: a pure function of the step.

    Attributes:
        weights: weight of each term that a source has at any time, by source.
        output_temperature: of the next-token divergence.
        router_temperature: of the router KL.
        divergence: what `output_kl` measures.
        jsd_beta: weight of the teacher in the mixture that jsd compares with.
    """

    weights: Mapping[str, Mapping[str, float]]
    output_temperature: float = 1.0
    router_temperature: float = 1.0
    divergence: Form = "forward_kl"
    jsd_beta: float = 0.5


def objective_at(train: TrainSection, share: float) -> Objective:
    """The objective when `share` of the run is over; 1 gives the one that validation measures."""
    return Objective(
        weights={
            name: {term: getattr(section, term).at(share) for term in terms_of(section)}
            for name, section in train.sources.items()
        },
        output_temperature=train.output_temperature.at(share),
        router_temperature=train.router_temperature.at(share),
        divergence=train.output_divergence,
        jsd_beta=train.jsd_beta,
    )


def terms_of(section: TrainSourceSection) -> tuple[str, ...]:
    """The terms that a source has a weight for at any time."""
    return tuple(term for term in TERMS if getattr(section, term))


def steady_terms(train: TrainSection, source: str) -> tuple[str, ...]:
    """The terms of a source whose weight and temperature never change, so that steps can be compared by them."""
    section = train.sources[source]
    temperatures = {"output_kl": train.output_temperature, ROUTER_KL: train.router_temperature}
    return tuple(
        term
        for term in terms_of(section)
        if getattr(section, term).constant is not None
        and (term not in temperatures or temperatures[term].constant is not None)
    )


def term_counts(
    weights: Mapping[str, Mapping[str, float]],
    targets: Mapping[str, int],
    router_positions: Mapping[str, int],
    tokens: Mapping[str, int],
) -> dict[str, int]:
    """Positions of the global batch that each term is a mean over.

    Args:
        weights: of `Objective`.
        targets: tokens in loss masks of each source in the global batch.
        router_positions: positions with router targets of each source in the global batch.
        tokens: of each source in the global batch, padding aside.
    """
    counts = {}
    for term in TERMS:
        of = router_positions if term == ROUTER_KL else tokens if term in OF_TOKENS else targets
        counts[term] = sum(of[name] for name, terms in weights.items() if term in terms)
    return counts


def shares(weights: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
    """What a source's sum of each of its terms is multiplied by in the global loss."""
    return {term: weight / max(1, counts[term]) for term, weight in weights.items()}


def loss_of(
    part: MicroBatch, output: Output, objective: Objective, weights: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the global loss; the parts of all micro-batches add up to it.

    Args:
        part: the sequences, on the student's device.
        output: what the student says about them.
        objective: temperatures and divergence.
        weights: of the terms to compute, as `shares` gives them.

    Returns:
        the weighted sum over its positions, differentiable, and each term's unweighted sum in nats (hidden_mse and
        load_balancing have no unit).
    """
    next_token = {term: weights[term] for term in NEXT_TOKEN_TERMS if term in weights}
    total, sums = _next_token(part.batch, output, objective, next_token)
    for term, value in _others(part.batch, output, objective, weights):
        total, sums[term] = total + weights[term] * value, value.detach()
    return total, sums


def _others(
    batch: TargetBatch, output: Output, objective: Objective, weights: Mapping[str, float]
) -> list[tuple[str, Tensor]]:
    """Sums of the terms that do not need the LM head."""
    sums = []
    if HIDDEN_MSE in weights:
        sums.append((HIDDEN_MSE, _hidden_mse(batch, output.hidden)))
    if ROUTER_KL in weights:
        sums.append((ROUTER_KL, _router_kl(batch, output.router_logits, objective.router_temperature)))
    if "load_balancing" in weights:
        sums.append(("load_balancing", load_balancing(output.router_logits, batch.valid, output.experts_per_token)))
    if "router_z" in weights:
        sums.append(("router_z", router_z(output.router_logits[batch.valid])))
    return sums


def _next_token(
    batch: TargetBatch, output: Output, objective: Objective, weights: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    predicts = batch.loss_mask[:, 1:]
    if not weights or not bool(predicts.any()):
        # A tie to all outputs: every trained parameter then gets a gradient, which data parallelism waits for.
        tie = output.hidden[:1, :1, 0].sum().double() + output.router_logits[:1, :1, :, 0].sum().double()
        return tie * 0, {term: torch.zeros((), dtype=torch.float64, device=tie.device) for term in weights}
    return output_losses(
        output.hidden[:, :-1][predicts],
        output.head,
        batch.input_ids[:, 1:][predicts],
        batch.output,
        weights,
        temperature=objective.output_temperature,
        divergence=objective.divergence,
        jsd_beta=objective.jsd_beta,
    )


def _hidden_mse(batch: TargetBatch, hidden: Tensor) -> Tensor:
    """Sum over positions that predict of the mean over dimensions of the squared difference from the teacher's."""
    assert isinstance(batch.output, HiddenTargets)
    student = hidden[:, :-1][batch.loss_mask[:, 1:]].float()
    return (student - batch.output.hidden.float()).square().mean(-1).sum(dtype=torch.float64)


def _router_kl(batch: TargetBatch, router_logits: Tensor, temperature: float) -> Tensor:
    """Sum over the positions that have router targets, in nats."""
    assert batch.router is not None
    positions = torch.arange(batch.input_ids.shape[1], device=router_logits.device)
    stored = batch.valid & (positions % batch.router.every == 0)
    return router_kl(batch.router, router_logits[stored], temperature).sum(dtype=torch.float64)
