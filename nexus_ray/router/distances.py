"""How far a student's routers are from its teacher's on the same tokens, and how decided each is.

Legend: n positions, L layers, E experts, K selected. Distributions are natural-log probabilities over the last
dimension; results keep the others. All are measures, not losses: call them without gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats; an event that p excludes adds nothing."""
    finite = log_p.clamp(min=torch.finfo(log_p.dtype).min)
    return (finite.exp() * (finite - log_q)).sum(-1)


def l1(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum over events of |p - q|, from 0 to 2."""
    return (log_p.exp() - log_q.exp()).abs_().sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    """Entropy in nats, from 0 to log of the number of events."""
    finite = log_p.clamp(min=torch.finfo(log_p.dtype).min)
    return -(finite.exp() * finite).sum(-1)


def selected(logits: Tensor, top_k: int) -> Tensor:
    """[..., E] true on the `top_k` largest logits."""
    return chosen(logits.topk(top_k, dim=-1).indices, logits.shape[-1])


def chosen(ids: Tensor, experts: int) -> Tensor:
    """[..., experts] true on the experts [..., K] of these numbers."""
    return torch.zeros(*ids.shape[:-1], experts, dtype=torch.bool, device=ids.device).scatter_(-1, ids, True)


def overlap(ours: Tensor, theirs: Tensor, top_k: int) -> Tensor:
    """Share of the `top_k` selected experts that two masks of `selected` have in common, from 0 to 1."""
    return (ours & theirs).sum(-1) / top_k
