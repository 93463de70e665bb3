"""The training objective: which losses a source enters with, and how token sums become one number.

Each term is the mean over the valid tokens of the global batch of the sources that have it, weighted per source:
sum over tokens of (source weight * loss) / number of tokens of sources with a positive weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_ray.config import TrainSourceSection
from nexus_ray.targets.compression import TopK
from nexus_ray.training import losses

TERMS = ("cross_entropy", "output_kl", "router_kl")
_ON_NEXT_TOKEN = ("cross_entropy", "output_kl")


@dataclass(frozen=True)
class Teacher:
    """What the teacher said about a micro-batch: either form of its output, and its routers, where needed.

    Attributes:
        logits: [B, T, V] of an online teacher.
        top: compressed distributions of a stored teacher.
        router_logits: [B, T, L, E].
    """

    logits: Tensor | None = None
    top: TopK | None = None
    router_logits: Tensor | None = None


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one source on the device.

    Attributes:
        source: name of the source.
        input_ids: [B, T].
        valid: [B, T] false on padding.
        teacher: its targets.
    """

    source: str
    input_ids: Tensor
    valid: Tensor
    teacher: Teacher


def weight_of(section: TrainSourceSection, term: str) -> float:
    """The weight of a term for a source."""
    weight: float = getattr(section, term)
    return weight


def token_sums(
    batch: MicroBatch, logits: Tensor, router_logits: Tensor, section: TrainSourceSection, temperature: float
) -> dict[str, Tensor]:
    """Sum over the valid tokens of a micro-batch of each loss that its source has a weight for, unweighted.

    Next-token losses count positions whose next token is valid; the router loss counts every valid token.
    """
    predicts = batch.valid[:, 1:]
    sums: dict[str, Tensor] = {}
    if section.cross_entropy:
        sums["cross_entropy"] = (losses.cross_entropy(logits, batch.input_ids) * predicts).sum()
    if section.output_kl:
        sums["output_kl"] = (_output_kl(batch.teacher, logits)[:, :-1] * predicts).sum()
    if section.router_kl:
        assert batch.teacher.router_logits is not None
        per_token = losses.router_kl(batch.teacher.router_logits, router_logits, temperature)
        sums["router_kl"] = (per_token * batch.valid).sum()
    return sums


def _output_kl(teacher: Teacher, logits: Tensor) -> Tensor:
    if teacher.top is not None:
        return losses.top_k_kl(teacher.top, logits)
    assert teacher.logits is not None
    return losses.full_kl(teacher.logits, logits)


def term_counts(
    sources: Mapping[str, TrainSourceSection], targets: Mapping[str, int], tokens: Mapping[str, int]
) -> dict[str, int]:
    """Tokens of the global batch that each term is a mean over.

    Args:
        sources: loss weights by source.
        targets: next-token positions of each source in the global batch.
        tokens: valid tokens of each source in the global batch.
    """
    counts = {}
    for term in TERMS:
        of = targets if term in _ON_NEXT_TOKEN else tokens
        counts[term] = sum(of[name] for name, section in sources.items() if weight_of(section, term))
    return counts


def combine(sums: Mapping[str, Tensor], section: TrainSourceSection, counts: Mapping[str, int]) -> Tensor:
    """A micro-batch's part of the global loss; the parts of all micro-batches add up to it."""
    parts = [weight_of(section, term) * value / counts[term] for term, value in sums.items()]
    return torch.stack(parts).sum()
