"""The frozen LM head and the next-token losses as one function with its own backward pass.

Logits of a whole batch would take more memory than the model's layers do. Here they exist for a few positions at a
time: the forward pass forms a chunk's logits, adds up its losses, and turns their gradient with respect to the logits
into one with respect to the hidden states before the next chunk begins. What is kept for the backward pass is that
gradient, of the size of the hidden states; no buffer has both all positions and the vocabulary.

A chunk holds its float32 logits and, at the worst moment, one buffer of that size for cross-entropy and one for a
top-K or sampled divergence; for a dense one three (forward KL), two (reverse KL) or four (jsd). While a bfloat16 head
makes logits, or their gradient is cast for it, there is half a buffer more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nexus_ray.modeling.head import chunks, logits_of
from nexus_ray.targets.teacher import HiddenTargets, OutputTargets, SampledTargets, TopKTargets
from nexus_ray.training.losses.divergences import Divergence, Form, divergence_of

CROSS_ENTROPY, OUTPUT_KL = "cross_entropy", "output_kl"
NEXT_TOKEN_TERMS = (CROSS_ENTROPY, OUTPUT_KL)


def output_losses(
    hidden: Tensor,
    head: Tensor,
    next_ids: Tensor,
    teacher: OutputTargets | None,
    weights: Mapping[str, float],
    *,
    temperature: float = 1.0,
    divergence: Form = "forward_kl",
    jsd_beta: float = 0.5,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Next-token losses of N positions through the frozen LM head.

    The divergence from the teacher is between distributions at `temperature`, times its square (Hinton et al., 2015,
    arXiv 1503.02531), so that its gradient keeps its size. What a kind of target makes of it:

    * top-K: a divergence over K + 1 events, the kept tokens and all others as one. A lower bound of the dense one
      (merging events cannot increase it), equal to it when K = V.
    * sampled: forward KL only; value and gradient are unbiased estimates of the dense ones.
    * hidden: the dense divergence.

    Args:
        hidden: [N, H] final hidden states; gets a gradient where it requires one.
        head: [V, H] weight of the LM head, which never gets one.
        next_ids: [N] the tokens that followed.
        teacher: targets of the N positions; needed by `output_kl` alone.
        weights: of the terms to compute, cross_entropy and output_kl, already divided by the tokens of the batch.
        temperature: of teacher and student in `output_kl`.
        divergence: what `output_kl` measures.
        jsd_beta: see `divergences.jensen_shannon`.

    Returns:
        the weighted total, which is differentiable, and each term's unweighted sum in nats, which is not; float64.

    Raises:
        ValueError: targets or tokens are not of N positions, or the targets do not know the form of divergence.
    """
    job = _Job(head, next_ids, teacher, dict(weights), temperature, divergence, divergence_of(divergence, jsd_beta))
    job.check(len(hidden))
    if torch.is_grad_enabled() and hidden.requires_grad:
        total, sums = cast(tuple[Tensor, Tensor], _OutputLosses.apply(hidden, job))
    else:
        sums = job.run(hidden, None)
        total = job.total(sums)
    return total, dict(zip(job.weights, sums.unbind(), strict=True))


class _OutputLosses(torch.autograd.Function):
    """The gradient is complete when the forward pass is; backward scales it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, job: _Job) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(hidden)
        sums = job.run(hidden, gradient)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return job.total(sums), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _sums: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None


@dataclass(frozen=True)
class _Job:
    """What `output_losses` was asked for."""

    head: Tensor
    next_ids: Tensor
    teacher: OutputTargets | None
    weights: dict[str, float]
    temperature: float
    form: Form
    measure: Divergence

    def check(self, positions: int) -> None:
        if len(self.next_ids) != positions:
            raise ValueError(f"{len(self.next_ids)} next tokens for {positions} positions")
        if OUTPUT_KL not in self.weights:
            return
        held = 0 if self.teacher is None else len(getattr(self.teacher, fields(self.teacher)[0].name))
        if self.teacher is None or held != positions:
            raise ValueError(f"targets of {held} positions for {positions}")
        if isinstance(self.teacher, SampledTargets) and self.form != "forward_kl":
            raise ValueError(f"sampled targets know forward_kl only, not {self.form}")

    def total(self, sums: Tensor) -> Tensor:
        """The weighted total of [terms] sums."""
        return (sums * sums.new_tensor(list(self.weights.values()))).sum()

    def run(self, hidden: Tensor, gradient: Tensor | None) -> Tensor:
        """[terms] sums over the rows of `hidden`; the gradient of their total is written to `gradient`."""
        sums = torch.zeros(len(self.weights), dtype=torch.float64, device=hidden.device)
        for rows in chunks(hidden, len(self.head)):
            sums += self._chunk(hidden[rows], rows, None if gradient is None else gradient[rows])
        return sums

    def _chunk(self, hidden: Tensor, rows: slice, gradient: Tensor | None) -> Tensor:
        """`run` on the rows of one chunk."""
        values, of_logits = self._of_logits(hidden, rows)
        if gradient is not None:
            gradient.copy_(of_logits.to(self.head.dtype) @ self.head)
        return values

    def _of_logits(self, hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """[terms] sums of a chunk, and the gradient of their weighted total with respect to its logits."""
        logits = logits_of(hidden, self.head)
        sums: dict[str, Tensor] = {}
        gradients = []
        if CROSS_ENTROPY in self.weights:
            values, gradient = _cross_entropy(logits, self.next_ids[rows])
            sums[CROSS_ENTROPY] = values.sum(dtype=torch.float64)
            gradients.append(gradient.mul_(self.weights[CROSS_ENTROPY]))
        if OUTPUT_KL in self.weights:
            values, gradient = self._from_teacher(_at(logits, self.temperature), rows)
            sums[OUTPUT_KL] = values.sum(dtype=torch.float64) * self.temperature**2
            gradients.append(gradient.mul_(self.weights[OUTPUT_KL] * self.temperature))
        total = gradients[0] if len(gradients) == 1 else gradients[0].add_(gradients[1])
        return torch.stack([sums[term] for term in self.weights]), total

    def _from_teacher(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """[n] divergences of a chunk and their gradient; overwrites `logits`, which the temperature has divided."""
        assert self.teacher is not None
        names = [field.name for field in fields(self.teacher)]
        part = replace(self.teacher, **{name: getattr(self.teacher, name)[rows] for name in names})
        if isinstance(part, TopKTargets):
            return _top_k(logits, part, self.measure)
        if isinstance(part, SampledTargets):
            return _sampled(logits, part)
        return self._dense(logits, part)

    def _dense(self, logits: Tensor, teacher: HiddenTargets) -> tuple[Tensor, Tensor]:
        log_p = _at(logits_of(teacher.hidden, self.head), self.temperature).log_softmax(-1)
        return self.measure(log_p, logits.log_softmax(-1))


def _at(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits.div_(temperature)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp of the last dimension, from one pass of exponentials."""
    probabilities = logits.softmax(-1)
    return probabilities, logits.amax(-1) - probabilities.amax(-1).log()


def _cross_entropy(logits: Tensor, next_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[n] negative log-probabilities of [n] tokens and their gradient [n, V]; leaves `logits` as they are."""
    ids = next_ids.unsqueeze(-1)
    gradient, log_sum = _softmax(logits)
    values = log_sum - logits.gather(-1, ids).squeeze(-1)
    return values, gradient.scatter_add_(-1, ids, gradient.new_full(ids.shape, -1.0))


def _sampled(logits: Tensor, teacher: SampledTargets) -> tuple[Tensor, Tensor]:
    """Forward KL with the mean over draws for the teacher's expectation of log q; a draw counts as often as drawn."""
    gradient, log_sum = _softmax(logits)
    log_q = logits.gather(-1, teacher.ids) - log_sum.unsqueeze(-1)
    values = -teacher.entropy.to(log_q.dtype) - log_q.mean(-1)
    share = gradient.new_full(teacher.ids.shape, -1 / teacher.ids.shape[-1])
    return values, gradient.scatter_add_(-1, teacher.ids, share)


def _top_k(logits: Tensor, teacher: TopKTargets, measure: Divergence) -> tuple[Tensor, Tensor]:
    """A divergence over the kept tokens and the rest as one event, whose logit is the log-sum-exp of its tokens.

    A token of the rest gets the part of the event's gradient that it is of the event.
    """
    kept = logits.gather(-1, teacher.ids)
    log_p = teacher.log_probs.to(kept.dtype)
    if kept.shape == logits.shape:
        values, gradient = measure(_finite(log_p), kept.log_softmax(-1))
        return values, logits.scatter_(-1, teacher.ids, gradient)
    of_rest, rest = _softmax(logits.scatter_(-1, teacher.ids, float("-inf")))
    log_q = torch.cat([kept, rest.unsqueeze(-1)], dim=-1).log_softmax(-1)
    log_p = torch.cat([log_p, teacher.tail_log_prob.to(kept.dtype).unsqueeze(-1)], dim=-1)
    values, gradient = measure(_finite(log_p), log_q)
    return values, of_rest.mul_(gradient[:, -1:]).scatter_(-1, teacher.ids, gradient[:, :-1])


def _finite(log_p: Tensor) -> Tensor:
    """A copy in which an event that cannot happen has a logarithm that arithmetic survives; exp makes it 0 again."""
    return log_p.clamp(min=torch.finfo(log_p.dtype).min)
