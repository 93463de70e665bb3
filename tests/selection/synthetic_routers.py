"""Router logits with a known structure, and their statistics."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nexus_ray.modeling.packed_experts import ExpertNorms
from nexus_ray.router.accumulate import moments_of_logits
from nexus_ray.router.artefact import Description, RouterStatistics
from nexus_ray.router.moments import RouterMoments

TOP_K = 2


def noise_logits(layers: int, experts: int, sequences: int = 16, length: int = 64, seed: int = 0) -> Tensor:
    """[sequences, length, layers, experts] logits in which no expert differs from another but by chance."""
    return torch.randn(sequences, length, layers, experts, generator=torch.Generator().manual_seed(seed))


def biased_logits(layers: int, experts: int, bias: float, seed: int = 0, **shape: int) -> Tensor:
    """Noise, but that the router prefers some experts of every layer: their mean logits are normal around zero.

    Args:
        layers: number of layers.
        experts: of each.
        bias: standard deviation of the mean logits.
        seed: of the draws.
        shape: sequences and length, as in `noise_logits`.
    """
    means = torch.randn(layers, experts, generator=torch.Generator().manual_seed(seed + 7))
    return noise_logits(layers, experts, seed=seed, **shape) + bias * means


def planted_logits(planted: list[list[int]], experts: int, sequences: int = 16, seed: int = 0) -> Tensor:
    """Logits of one layer a list, in which the named experts take turns and the others are faint noise."""
    logits = noise_logits(len(planted), experts, sequences, seed=seed) * 0.1
    generator = torch.Generator().manual_seed(seed + 1)
    for layer, names in enumerate(planted):
        turn = torch.randint(len(names), logits.shape[:2], generator=generator)
        logits[:, :, layer].scatter_(2, torch.tensor(names)[turn][..., None], 4.0)
    return logits


def moments_of(logits: Tensor, norms_of: Tensor | None = None) -> RouterMoments:
    """Moments of logits whose sequences belong to the halves in turn.

    `norms_of` [experts] makes each expert's output of that norm, for every token.
    """
    sequences, length, layers, _ = logits.shape
    norms = []
    if norms_of is not None:
        for layer in range(layers):
            top = logits[:, :, layer].flatten(0, 1).topk(TOP_K)
            norms.append(ExpertNorms(top.indices, norms_of[top.indices] * top.values.softmax(dim=-1)))
    return moments_of_logits(logits, np.ones((sequences, length), bool), np.arange(sequences) % 2, TOP_K, norms)


def statistics_of(
    sources: dict[str, RouterMoments], base_fingerprint: str = "base", tokenizer_sha256: str = "tokenizer"
) -> RouterStatistics:
    """What `collect` would have written."""
    first = next(iter(sources.values()))
    description = Description(
        base_fingerprint=base_fingerprint,
        tokenizer_sha256=tokenizer_sha256,
        sequence_length=64,
        layers=first.layers,
        experts=first.experts,
        experts_per_token=TOP_K,
        tokens={name: moments.tokens for name, moments in sources.items()},
    )
    return RouterStatistics(description, sources)
