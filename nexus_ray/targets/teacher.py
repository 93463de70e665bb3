"""What a teacher said, decoded: the forms that losses understand. Leading dimensions are positions.

Output targets line up with the positions whose next token is in the loss mask, in the order of the batch; router
targets with the positions and layers that their encoding keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopKTargets:
    """A distribution kept as K + 1 events: K of its most likely outcomes and all others together.

    Attributes:
        ids: [..., K] int64 outcomes, ascending; tokens of the vocabulary, or experts of a layer.
        log_probs: [..., K] float32, their natural-log probabilities.
        tail_log_prob: [...] float32, log of the probability of every other outcome together; very negative without one.
    """

    ids: Tensor
    log_probs: Tensor
    tail_log_prob: Tensor

    def to(self, device: torch.device) -> TopKTargets:
        """The same on `device`."""
        return TopKTargets(self.ids.to(device), self.log_probs.to(device), self.tail_log_prob.to(device))


@dataclass(frozen=True)
class SampledTargets:
    """A distribution as draws from it. The mean of any function over the draws is an unbiased estimate of its
    expectation (arXiv 2503.16870).

    Attributes:
        ids: [..., N] int64 tokens, ascending; one that was drawn twice stands there twice.
        entropy: [...] float32, entropy of the whole distribution in nats.
    """

    ids: Tensor
    entropy: Tensor

    def to(self, device: torch.device) -> SampledTargets:
        """The same on `device`."""
        return SampledTargets(self.ids.to(device), self.entropy.to(device))


@dataclass(frozen=True)
class HiddenTargets:
    """The whole distribution, as what the frozen LM head makes it from.

    Attributes:
        hidden: [..., hidden] final hidden states, after the last norm.
    """

    hidden: Tensor

    def to(self, device: torch.device) -> HiddenTargets:
        """The same on `device`."""
        return HiddenTargets(self.hidden.to(device))


OutputTargets = TopKTargets | SampledTargets | HiddenTargets


@dataclass(frozen=True)
class RouterTargets:
    """Routers at some positions and layers: all logits, or the selected experts with the rest as one event.

    Attributes:
        layers: numbers of the L' layers.
        every: position t of a sequence is there when t % every == 0.
        logits: [positions, L', experts] float32, up to a constant of each router; or None.
        selected: [positions, L', experts_per_token]; or None.
    """

    layers: tuple[int, ...]
    every: int
    logits: Tensor | None = None
    selected: TopKTargets | None = None

    def to(self, device: torch.device) -> RouterTargets:
        """The same on `device`."""
        logits = None if self.logits is None else self.logits.to(device)
        return RouterTargets(self.layers, self.every, logits, self.selected.to(device) if self.selected else None)
