"""Ways to keep a teacher's distribution, as what a reader has of it: for `targets_compression.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import log

import torch
from _distillkit import DistillKit
from torch import Tensor

from nexus_ray.modeling.head import logits_of
from nexus_ray.targets.encoding.encodings import HiddenEncoding
from nexus_ray.targets.encoding.top_k import TopKEncoding


@dataclass(frozen=True)
class Outputs:
    """What a teacher says at some positions.

    Attributes:
        hidden: [positions, hidden] final hidden states.
        logits: [positions, V] float32.
        log_probs: [positions, V] float64.
        probs: [positions, V] float64.
    """

    hidden: Tensor
    logits: Tensor
    log_probs: Tensor
    probs: Tensor

    @cached_property
    def entropy(self) -> Tensor:
        """[positions] in nats."""
        return -(self.probs * self.log_probs).sum(-1)


@dataclass(frozen=True)
class Spread:
    """A reconstructed distribution: some tokens, and the rest of the mass in equal parts.

    Attributes:
        ids: [positions, K].
        log_probs: [positions, K] float64, of these tokens.
        other: [positions] float64, of each other token.
    """

    ids: Tensor
    log_probs: Tensor
    other: Tensor

    def events(self, vocabulary: int) -> Tensor:
        """[positions, K + 1] log-probabilities: the tokens and all others as one event."""
        return torch.cat([self.log_probs, (self.other + log(vocabulary - self.ids.shape[-1])).unsqueeze(-1)], dim=-1)

    def renormalised(self, vocabulary: int) -> Spread:
        """The same, adding up to one."""
        total = self.events(vocabulary).logsumexp(-1)
        return Spread(self.ids, self.log_probs - total.unsqueeze(-1), self.other - total)

    def losses(self, teacher: Outputs) -> dict[str, float]:
        """Nats lost, summed over positions: `kl` of the whole distribution, `events` of the K + 1 events."""
        vocabulary = teacher.probs.shape[-1]
        kept = teacher.probs.gather(-1, self.ids)
        rest = (1 - kept.sum(-1)).clamp(min=0)
        crossed = -(kept * self.log_probs).sum(-1) - rest * self.other
        events = torch.cat([kept, rest.unsqueeze(-1)], dim=-1)
        lost = torch.xlogy(events, events) - events * self.events(vocabulary)
        return {"kl": float((crossed - teacher.entropy).sum()), "events": float(lost.sum())}


@dataclass(frozen=True)
class Form:
    """One way to keep a distribution.

    Attributes:
        bytes: a token, for a vocabulary and a hidden size.
        losses: nats lost by what is read back, summed over positions, by kind.
    """

    bytes: Callable[[int, int], int]
    losses: Callable[[Outputs], dict[str, float]]


def top_k_bytes(k: int, bits: int, vocabulary: int) -> int:
    """Bytes a token of `topk` targets."""
    return sum(TopKEncoding(k=k, vocabulary=vocabulary, value_bits=bits).widths().values())


def top_k_form(k: int, bits: int) -> Form:
    """`topk` targets."""

    def losses(teacher: Outputs) -> dict[str, float]:
        vocabulary = teacher.logits.shape[-1]
        encoding = TopKEncoding(k=k, vocabulary=vocabulary, value_bits=bits)
        found = encoding.decode(encoding.encode(teacher.logits))
        other = found.tail_log_prob.double() - log(vocabulary - k)
        return Spread(found.ids, found.log_probs.double(), other).renormalised(vocabulary).losses(teacher)

    return Form(lambda vocabulary, _: top_k_bytes(k, bits, vocabulary), losses)


def float16_form(k: int) -> Form:
    """What nexus-ray kept before: log-probabilities and tail in float16, ids in four bytes each."""

    def losses(teacher: Outputs) -> dict[str, float]:
        vocabulary = teacher.logits.shape[-1]
        top = teacher.log_probs.topk(k)
        tail = teacher.probs.scatter(-1, top.indices, 0).sum(-1).log()
        other = tail.half().double() - log(vocabulary - k)
        return Spread(top.indices, top.values.half().double(), other).renormalised(vocabulary).losses(teacher)

    return Form(lambda _vocabulary, _hidden: k * (4 + 2) + 2, losses)


def distillkit_form(rival: DistillKit, *, renormalised: bool) -> Form:
    """DistillKit's targets; as they are read, they may not add up to one."""

    def losses(teacher: Outputs) -> dict[str, float]:
        vocabulary = teacher.logits.shape[-1]
        found = Spread(*rival.reconstructed(teacher.log_probs))
        return (found.renormalised(vocabulary) if renormalised else found).losses(teacher)

    return Form(lambda vocabulary, _: rival.bytes_per_token(vocabulary), losses)


def hidden_form(dtype: str, head: Tensor) -> Form:
    """`hidden` targets, of which `head` [V, hidden] makes logits."""

    def encoding(size: int) -> HiddenEncoding:
        return HiddenEncoding.model_validate({"hidden_size": size, "dtype": dtype})

    def losses(teacher: Outputs) -> dict[str, float]:
        one = encoding(teacher.hidden.shape[-1])
        logits = logits_of(one.decode(one.encode(teacher.hidden)).hidden, head)
        crossed = -(teacher.probs * logits.double().log_softmax(-1)).sum(-1)
        return {"kl": float((crossed - teacher.entropy).sum())}

    return Form(lambda _, size: sum(encoding(size).widths().values()), losses)
