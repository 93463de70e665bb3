"""Routers while training: how far the student's are from its teacher's, layer by layer, and how they spread tokens.

Sums over positions in float64, which workers add up; means are taken of the sums of all of them. Legend: n positions,
L layers, E experts, K selected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexus_ray.router import distances
from nexus_ray.targets.teacher import RouterTargets

_COMPARED = ("compared", "kl", "l1", "overlap", "compared_entropy", "whole", "teacher_entropy")
_ALL = ("positions", "entropy")
_DIGITS = 6


class RouterMeter:
    """Sums over the positions of a step.

    Of stored targets that know only the selected experts, KL and L1 are taken over K + 1 events, all other experts
    being one: neither is larger than over all experts. The overlap is exact; the teacher's entropy is unknown.

    Args:
        layers: of the model.
        experts: of a layer.
        top_k: experts that a router selects.
        temperature: that selected router targets were made at; their KL and L1 are of distributions at it. Everything
            else is at temperature 1, whatever the loss uses.
        device: where the sums are.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        top_k: int,
        *,
        temperature: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        self._shape = (layers, experts)
        self._top_k = top_k
        self._temperature = temperature
        width = len(_COMPARED) + len(_ALL) + experts
        self._sums = torch.zeros(layers, width, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, teacher: RouterTargets | None, student_logits: Tensor) -> None:
        """Take in the positions of a micro-batch.

        Args:
            teacher: targets of n positions, or None where there are none.
            student_logits: [n, L, E] of the same positions, or of all valid ones without a teacher.
        """
        logits = student_logits.detach().float()
        log_q, chosen = logits.log_softmax(-1), distances.selected(logits, self._top_k)
        entropy = distances.entropy(log_q)
        own = torch.stack([torch.ones_like(entropy), entropy], dim=-1)
        first = len(_COMPARED)
        self._sums[:, first : first + len(_ALL)] += own.sum(0, dtype=torch.float64)
        self._sums[:, first + len(_ALL) :] += chosen.sum(0)
        if teacher is not None:
            of = list(teacher.layers)
            values = self._compare(teacher, logits[:, of], log_q[:, of], chosen[:, of], entropy[:, of])
            self._sums[of, :first] += values.sum(0, dtype=torch.float64)

    def _compare(
        self, teacher: RouterTargets, logits: Tensor, log_q: Tensor, chosen: Tensor, entropy: Tensor
    ) -> Tensor:
        """[n, L', 7] what is summed of positions and layers with targets, in the order of `_COMPARED`."""
        one = torch.ones_like(entropy)
        if teacher.selected is None:
            assert teacher.logits is not None
            log_p = teacher.logits.float().log_softmax(-1)
            theirs, whole, teacher_entropy = distances.selected(log_p, self._top_k), one, distances.entropy(log_p)
        else:
            ids = teacher.selected.ids
            theirs = distances.chosen(ids, logits.shape[-1])
            log_p, log_q = _selected_events(teacher, logits / self._temperature, theirs)
            whole = teacher_entropy = torch.zeros_like(one)
        overlap = distances.overlap(chosen, theirs, self._top_k)
        measures = distances.kl(log_p, log_q), distances.l1(log_p, log_q), overlap
        return torch.stack([one, *measures, entropy, whole, teacher_entropy], dim=-1)

    def sums(self) -> Tensor:
        """A copy of the sums, flat float64; those of several workers add up."""
        return self._sums.flatten().clone()

    def record(self, sums: Tensor) -> dict[str, Any]:
        """What metrics say, lists by layer; empty without any position.

        Args:
            sums: of `sums()`, of one worker or added over all.

        Returns:
            `entropy` (nats; of the positions compared where a layer has any, of all others' else), `busiest` (share of
            tokens that select the expert selected most; K / E when all are used alike) and `unused` (experts that no
            token selects). With a teacher also `kl` (teacher || student, nats a position), `l1` (0 to 2), `overlap`
            (share of the teacher's selected experts that the student selects) and `teacher_entropy`; None in layers
            without targets, and for the entropy of teachers that are known by their selection only.
        """
        table = sums.reshape(self._shape[0], -1).cpu()
        compared = dict(zip(_COMPARED, table.T, strict=False))
        positions, entropy, *load = table.T[len(_COMPARED) :]
        if not positions.any():
            return {}
        usage = torch.stack(load, dim=-1)
        kept = torch.where(compared["compared"] > 0, compared["compared_entropy"], entropy)
        record = {
            "entropy": _means(kept, torch.where(compared["compared"] > 0, compared["compared"], positions)),
            "busiest": _means(usage.max(-1).values, positions),
            "unused": [int(count) for count in (usage == 0).sum(-1)],
        }
        if not compared["compared"].any():
            return record
        measures = {name: _means(compared[name], compared["compared"]) for name in ("kl", "l1", "overlap")}
        return measures | record | {"teacher_entropy": _means(compared["teacher_entropy"], compared["whole"])}


def _selected_events(teacher: RouterTargets, logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student over the selected experts and, where there are any, all others."""
    known = teacher.selected
    assert known is not None
    log_q = logits.log_softmax(-1).gather(-1, known.ids)
    if chosen.shape[-1] == known.ids.shape[-1]:
        return known.log_probs, log_q
    rest = logits.masked_fill(chosen, float("-inf")).logsumexp(-1) - logits.logsumexp(-1)
    log_p = torch.cat([known.log_probs, known.tail_log_prob.unsqueeze(-1)], dim=-1)
    return log_p, torch.cat([log_q, rest.unsqueeze(-1)], dim=-1)


def _means(sums: Tensor, counts: Tensor) -> list[float | None]:
    """Sums divided by counts, six digits of each; None where nothing was counted."""
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    return [float(f"{value / count:.{_DIGITS}g}") if count else None for value, count in pairs]
