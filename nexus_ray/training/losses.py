"""Distillation losses, per token, in nats. Legend: B sequences, T tokens, V vocabulary, K kept, L layers, E experts.

Every function returns one value a position; the caller masks and averages over the global batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_ray.targets.compression import TopK

# Below this, 1 - sum(p) of the kept tokens is float32 noise; its logarithm would be noise of either sign.
_SMALLEST_TAIL = 1e-6


def cross_entropy(logits: Tensor, input_ids: Tensor) -> Tensor:
    """[B, T-1] negative log-probability of each next token, from `logits` [B, T, V] and `input_ids` [B, T]."""
    predicted = logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(predicted, input_ids[:, 1:].flatten(), reduction="none").view(len(input_ids), -1)


def full_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) over the last dimension, times temperature squared (Hinton et al., 2015)."""
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1) * temperature**2


def top_k_kl(teacher: TopK, student_logits: Tensor) -> Tensor:
    """[B, T] KL over K + 1 events: the teacher's K kept tokens, and all other tokens as one.

    A lower bound of the full KL (merging events cannot increase it), equal to it when K = V.

    Args:
        teacher: kept log-probabilities [B, T, K] and tail [B, T].
        student_logits: [B, T, V].
    """
    log_probs = F.log_softmax(student_logits.float(), dim=-1)
    kept = log_probs.gather(-1, teacher.ids)
    student_tail = (1 - kept.exp().sum(dim=-1)).clamp(min=_SMALLEST_TAIL).log()
    teacher_kept = teacher.log_probs.float()
    divergence = (teacher_kept.exp() * (teacher_kept - kept)).sum(dim=-1)
    tail_mass = teacher.tail_log_prob.exp()
    tail = tail_mass * (teacher.tail_log_prob.clamp(min=torch.tensor(_SMALLEST_TAIL).log()) - student_tail)
    return divergence + tail


def router_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float) -> Tensor:
    """[B, T] mean over layers of T^2 KL(teacher || student) between full router distributions [B, T, L, E]."""
    return full_kl(teacher_logits, student_logits, temperature).mean(dim=-1)
