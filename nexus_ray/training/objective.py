"""The training objective: which losses a source enters with, and how token sums become one number.

Each term is a mean over the positions of the global batch of the sources that have it, weighted per source:
sum over positions of (source weight * loss) / number of positions of sources with a positive weight. Next-token terms
count tokens in the loss mask; the router term counts positions that have router targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_ray.config import TrainSection, TrainSourceSection
from nexus_ray.targets.reading.reader import TargetBatch
from nexus_ray.training.chunked import NEXT_TOKEN_TERMS, output_losses
from nexus_ray.training.losses import router_kl

ROUTER_KL = "router_kl"
TERMS = (*NEXT_TOKEN_TERMS, ROUTER_KL)


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
    """

    hidden: Tensor
    router_logits: Tensor
    head: Tensor


def weight_of(section: TrainSourceSection, term: str) -> float:
    """The weight of a term for a source."""
    weight: float = getattr(section, term)
    return weight


def term_counts(
    sources: Mapping[str, TrainSourceSection], targets: Mapping[str, int], router_positions: Mapping[str, int]
) -> dict[str, int]:
    """Positions of the global batch that each term is a mean over.

    Args:
        sources: loss weights by source.
        targets: tokens in loss masks of each source in the global batch.
        router_positions: positions with router targets of each source in the global batch.
    """
    counts = {}
    for term in TERMS:
        of = router_positions if term == ROUTER_KL else targets
        counts[term] = sum(of[name] for name, section in sources.items() if weight_of(section, term))
    return counts


def shares(section: TrainSourceSection, counts: Mapping[str, int]) -> dict[str, float]:
    """What a source's sum of each of its terms is multiplied by in the global loss."""
    weights = {term: weight_of(section, term) for term in TERMS}
    return {term: weight / max(1, counts[term]) for term, weight in weights.items() if weight}


def loss_of(
    part: MicroBatch, output: Output, train: TrainSection, weights: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the global loss; the parts of all micro-batches add up to it.

    Args:
        part: the sequences, on the student's device.
        output: what the student says about them.
        train: temperatures and divergence.
        weights: of the terms to compute, as `shares` gives them.

    Returns:
        the weighted sum over its positions, differentiable, and each term's unweighted sum in nats.
    """
    total, sums = _next_token(part.batch, output, train, {t: weights[t] for t in NEXT_TOKEN_TERMS if t in weights})
    if ROUTER_KL in weights:
        value = _router(part.batch, output.router_logits, train.router_temperature)
        total, sums[ROUTER_KL] = total + weights[ROUTER_KL] * value, value.detach()
    return total, sums


def _next_token(
    batch: TargetBatch, output: Output, train: TrainSection, weights: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    if not weights:
        # A tie to the hidden states: every trained parameter then gets a gradient, which data parallelism waits for.
        return output.hidden[:1, :1, 0].sum().double() * 0, {}
    predicts = batch.loss_mask[:, 1:]
    return output_losses(
        output.hidden[:, :-1][predicts],
        output.head,
        batch.input_ids[:, 1:][predicts],
        batch.output,
        weights,
        temperature=train.output_temperature,
        divergence=train.output_divergence,
        jsd_beta=train.jsd_beta,
    )


def _router(batch: TargetBatch, router_logits: Tensor, temperature: float) -> Tensor:
    """Sum over the positions that have router targets, in nats."""
    assert batch.router is not None
    positions = torch.arange(batch.input_ids.shape[1], device=router_logits.device)
    stored = batch.valid & (positions % batch.router.every == 0)
    return router_kl(batch.router, router_logits[stored], temperature).sum(dtype=torch.float64)
