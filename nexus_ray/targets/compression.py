"""Compressing teacher distributions to the top K log-probabilities and the mass of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """A distribution over the vocabulary kept as K + 1 events: the K most likely tokens and all others together.

    Attributes:
        ids: [..., K] int64 token ids, most likely first.
        log_probs: [..., K] their natural-log probabilities.
        tail_log_prob: [...] log of the probability of every other token together.
    """

    ids: Tensor
    log_probs: Tensor
    tail_log_prob: Tensor

    def to(self, device: torch.device) -> TopK:
        """The same distributions on `device`."""
        return TopK(self.ids.to(device), self.log_probs.to(device), self.tail_log_prob.to(device))


def compress(logits: Tensor, k: int) -> TopK:
    """Keep the K largest log-probabilities of `logits` [..., vocabulary] and the exact tail mass.

    The tail is a log-sum-exp over the remaining logits, not 1 minus a sum, so that it stays accurate when it is
    tiny. Values are rounded to float16 as they are stored.
    """
    logits = logits.float()
    k = min(k, logits.shape[-1])
    top = logits.topk(k, dim=-1)
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    rest = logits.scatter(-1, top.indices, float("-inf"))
    tail = rest.logsumexp(dim=-1) - normaliser.squeeze(-1)
    return TopK(top.indices, (top.values - normaliser).half(), tail.clamp(min=torch.finfo(torch.float32).min))
