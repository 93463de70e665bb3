"""Divergences between two distributions over the same events, with their gradients written out.

Every function takes natural-log probabilities of a teacher p and a student q, both [positions, events] and normalised,
and returns the divergence [positions] in nats and its gradient [positions, events] with respect to logits whose
log-softmax is log q. For g_e = dD / d log q_e that gradient is g_e - q_e * sum(g). The functions overwrite their
arguments: events may be a whole vocabulary, where one buffer more is felt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Form = Literal["forward_kl", "reverse_kl", "jsd"]
Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def divergence_of(form: Form, jsd_beta: float = 0.5) -> Divergence:
    """The divergence of this name.

    Args:
        form: forward_kl is KL(p || q), reverse_kl is KL(q || p), jsd lies between them.
        jsd_beta: weight of the teacher in the mixture that jsd compares both with; other forms know none.
    """
    forms: dict[Form, Divergence] = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": partial(jensen_shannon, beta=jsd_beta),
    }
    return forms[form]


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q): g = -p."""
    p = log_p.exp()
    values = log_p.sub_(log_q).mul_(p).sum(-1)
    return values, log_q.exp_().sub_(p)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p): g = q log(q / p), but for a constant that normalisation takes away."""
    ratio = log_p.neg_().add_(log_q)
    q = log_q.exp_()
    return _gradient(ratio.mul_(q), q)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q: g = (1 - beta) q log(q / m).

    The generalised Jensen-Shannon divergence of Agarwal et al. (2023, arXiv 2306.13649).
    """
    log_m, scratch = log_p + math.log(beta), log_q + math.log1p(-beta)
    torch.logaddexp(log_m, scratch, out=log_m)
    p = torch.exp(log_p, out=scratch)
    of_teacher = log_p.sub_(log_m).mul_(p).sum(-1)
    ratio = torch.sub(log_q, log_m, out=log_m)
    q = log_q.exp_()
    of_student, gradient = _gradient(ratio.mul_(q), q)
    return beta * of_teacher + (1 - beta) * of_student, gradient.mul_(1 - beta)


def _gradient(g: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of g, g - q * sum of g), written over `g`."""
    total = g.sum(-1)
    return total, g.addcmul_(q, total.unsqueeze(-1), value=-1)
