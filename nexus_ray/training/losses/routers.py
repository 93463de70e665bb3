"""Losses on routers, in nats where they are divergences. Legend: n positions, L layers, E experts, K selected.

Routers are small, so autograd does the rest; losses on the vocabulary are in `chunked.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_ray.targets.teacher import RouterTargets, TopKTargets


def full_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over the last dimension, times temperature squared (Hinton et al., 2015)."""
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1) * temperature**2


def selected_kl(teacher: TopKTargets, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over K + 1 events, the selected experts and all others as one, times temperature squared.

    Args:
        teacher: log-probabilities [..., K] at `temperature`, and of the rest [...].
        student_logits: [..., E].
        temperature: of the student too.
    """
    logits = student_logits.float() / temperature
    selected = logits.gather(-1, teacher.ids)
    log_p = teacher.log_probs
    if selected.shape != logits.shape:
        rest = logits.scatter(-1, teacher.ids, float("-inf")).logsumexp(-1, keepdim=True)
        selected = torch.cat([selected, rest], dim=-1)
        log_p = torch.cat([log_p, teacher.tail_log_prob.unsqueeze(-1)], dim=-1)
    log_p = log_p.clamp(min=torch.finfo(torch.float32).min)  # an event that cannot happen adds 0, not 0 times infinity
    return (log_p.exp() * (log_p - selected.log_softmax(-1))).sum(-1) * temperature**2


def router_kl(teacher: RouterTargets, student_logits: Tensor, temperature: float) -> Tensor:
    """[n] mean over the layers with targets of the divergence from the teacher's routers.

    Args:
        teacher: targets of n positions and L' layers.
        student_logits: [n, L, E].
        temperature: of teacher and student; that of selected targets was set when they were made.
    """
    logits = student_logits[:, list(teacher.layers)]
    if teacher.selected is not None:
        return selected_kl(teacher.selected, logits, temperature).mean(dim=-1)
    assert teacher.logits is not None
    return full_kl(teacher.logits, logits, temperature).mean(dim=-1)


def router_z(logits: Tensor) -> Tensor:
    """Squared log-sum-exp of router logits [n, L, E]: mean over layers, sum over positions.

    The router z-loss of Zoph et al. (2022, arXiv:2202.08906, equation 5).
    """
    return logits.float().logsumexp(-1).square().mean(-1).sum(dtype=torch.float64)


def load_balancing(logits: Tensor, valid: Tensor, experts_per_token: int) -> Tensor:
    """How unevenly each sequence uses the experts: mean over layers, sum over sequences, each times its tokens.

    E * sum over experts of (share of the selections) * (mean probability); 1 for a layer that uses all alike. It is
    the sequence-wise balance loss of DeepSeek-V3 (2024, arXiv:2412.19437, equations 17 to 20): a property of each
    sequence, so that the global mean does not depend on micro-batches or workers, as one of batches would.

    Args:
        logits: [B, T, L, E] router logits.
        valid: [B, T] false on padding.
        experts_per_token: experts that are selected.
    """
    kept = valid[:, :, None, None].float()
    tokens = valid.sum(1).clamp(min=1)[:, None, None]
    selected = torch.zeros_like(logits, dtype=torch.float32)
    selected.scatter_(-1, logits.topk(experts_per_token, dim=-1).indices, 1.0 / experts_per_token)
    share = (selected * kept).sum(1) / tokens
    probability = (logits.float().softmax(-1) * kept).sum(1) / tokens
    balance = logits.shape[-1] * (share * probability).sum(-1).mean(-1)
    return (balance * valid.sum(1)).sum(dtype=torch.float64)
