"""What the micro-batches of a step, or of a validation, add up to, on all workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nexus_ray.config import TrainSection
from nexus_ray.families import MoeDimensions
from nexus_ray.targets.teacher import RouterTargets
from nexus_ray.training.losses.objective import TERMS, MicroBatch, Output, terms_of
from nexus_ray.training.trainer import sum_over_workers
from nexus_ray.training.watching.routers import RouterMeter


class StepSums:
    """The global loss by source and term, and what is known about routers.

    Args:
        train: sources, their terms and temperatures.
        dimensions: of the model.
        device: where the sums are.
    """

    def __init__(self, train: TrainSection, dimensions: MoeDimensions, device: torch.device) -> None:
        self._terms = {name: terms_of(section) for name, section in train.sources.items()}
        self._values = torch.zeros(len(self._terms), len(TERMS), dtype=torch.float64, device=device)
        self._meter = RouterMeter(
            dimensions.layers,
            dimensions.experts,
            dimensions.experts_per_token,
            temperature=train.router_temperature.final,
            device=device,
        )

    def add(self, part: MicroBatch, output: Output, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        """Take in a micro-batch: its unweighted sums, and the weights with which they enter the global loss."""
        row = self._values[list(self._terms).index(part.source)]
        for term, value in terms.items():
            row[TERMS.index(term)] += value.detach() * weights[term]
        teacher = part.batch.router
        self._meter.add(teacher, output.router_logits[_compared(part, teacher)])

    def record(self) -> dict[str, Any]:
        """The global loss, its terms together and by source (nats a token), and the routers. All workers call it."""
        meter = self._meter.sums()
        together = sum_over_workers(torch.cat([self._values.flatten(), meter]))
        values = together[: self._values.numel()].view_as(self._values)
        sources = {
            name: {term: float(values[index, TERMS.index(term)]) for term in terms}
            for index, (name, terms) in enumerate(self._terms.items())
        }
        used = {term for terms in self._terms.values() for term in terms}
        totals = {term: float(values[:, index].sum()) for index, term in enumerate(TERMS) if term in used}
        routers = self._meter.record(together[self._values.numel() :])
        return {"loss": sum(totals.values()), **totals, "sources": sources, "router": routers}


def _compared(part: MicroBatch, teacher: RouterTargets | None) -> Tensor:
    """[B, T] the positions that the teacher speaks about; all tokens when there is none."""
    valid = part.batch.valid
    if teacher is None:
        return valid
    return valid & (torch.arange(valid.shape[1], device=valid.device) % teacher.every == 0)
