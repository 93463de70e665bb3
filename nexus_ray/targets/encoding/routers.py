"""How router distributions are encoded: all logits in 8 bits, or the selected experts and the mass of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from nexus_ray.targets.encoding.top_k import TopKEncoding
from nexus_ray.targets.teacher import RouterTargets, TopKTargets

_LEVELS = 255
_SCALE_BYTES = 2  # one float16: a step
_LEAST_STEP = 2.0**-24  # the smallest positive float16
_VALUE_BITS = 8


class RouterEncoding(BaseModel):
    """Routers of some layers at some positions.

    Attributes:
        mode: logits: all; selected: those of the chosen experts, and the mass of the rest.
        layers: numbers of the layers, from 0, ascending.
        every: positions 0, every, 2 * every, ... of a sequence are stored.
        experts: E, of a layer.
        experts_per_token: chosen.
        temperature: that selected logits were divided by; all logits know none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    mode: Literal["logits", "selected"]
    layers: tuple[int, ...] = Field(min_length=1)
    every: int = Field(ge=1)
    experts: int = Field(ge=1)
    experts_per_token: int = Field(ge=1)
    temperature: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _chosen_are_experts(self) -> Self:
        if self.experts_per_token > self.experts:
            raise ValueError(f"cannot choose {self.experts_per_token} of {self.experts} experts")
        return self

    def positions(self, num_tokens: int) -> int:
        """Positions that are stored of a sequence of so many tokens."""
        return ceil(num_tokens / self.every)

    def widths(self) -> dict[str, int]:
        """Bytes a stored position, of all layers, by column."""
        if self.mode == "logits":
            one = {"router_logits": self.experts, "router_scale": _SCALE_BYTES}
        else:
            one = self._selected().widths()
        return {name: width * len(self.layers) for name, width in one.items()}

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """[positions, L', E] router logits, of the stored positions and layers, as [positions, width] uint8.

        Raises:
            ValueError: one is NaN or infinite.
        """
        flat = logits.float().flatten(0, 1)
        if not bool(flat.isfinite().all()):
            raise ValueError("router logits are NaN or infinite")
        columns = self._selected().encode(flat) if self.mode == "selected" else _in_levels(flat)
        return {name: columns[name].view(len(logits), width) for name, width in self.widths().items()}

    def decode(self, columns: Mapping[str, Tensor]) -> RouterTargets:
        """The targets of [positions, width] uint8 columns.

        Raises:
            ArtefactError: the bytes were not written by `encode`.
        """
        layers = len(self.layers)
        flat = {name: columns[name].reshape(-1, width // layers) for name, width in self.widths().items()}
        positions = len(next(iter(flat.values()))) // layers
        if self.mode == "selected":
            found = self._selected().decode(flat)
            shape = (positions, layers, self.experts_per_token)
            selected = TopKTargets(
                found.ids.view(shape), found.log_probs.view(shape), found.tail_log_prob.view(shape[:2])
            )
            return RouterTargets(self.layers, self.every, selected=selected)
        step = flat["router_scale"].contiguous().view(torch.float16).float()
        logits = -flat["router_logits"].float() * step
        return RouterTargets(self.layers, self.every, logits=logits.view(positions, layers, self.experts))

    def _selected(self) -> TopKEncoding:
        return TopKEncoding(
            k=self.experts_per_token,
            vocabulary=self.experts,
            value_bits=_VALUE_BITS,
            temperature=self.temperature or 1.0,
            prefix="router",
        )


def _in_levels(logits: Tensor) -> dict[str, Tensor]:
    """Columns of [rows, E] logits: how many steps each is below the largest of its row, and the step."""
    below = logits.amax(-1, keepdim=True) - logits
    step = (below.amax(-1, keepdim=True) / _LEVELS).clamp(max=torch.finfo(torch.float16).max).half()
    levels = (below / step.float().clamp(min=_LEAST_STEP)).round().clamp(max=_LEVELS)
    return {"router_logits": levels.to(torch.uint8), "router_scale": step.view(torch.uint8)}
