"""The most likely outcomes of a distribution with quantised log-probabilities, and the exact mass of all others.

What is stored was chosen by rate and distortion on real teachers (`benchmarks/targets_compression.py`): at equal bytes
more outcomes are worth more than finer values, levels at equal distances of the log-probability are as good as curves,
and levels that start at the second outcome instead of the first halve the error, since one outcome often stands alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from nexus_ray.targets.encoding.bits import pack, pack_sorted, packed_bytes, sorted_bytes, unpack, unpack_sorted
from nexus_ray.targets.encoding.chunks import in_chunks, probabilities, tempered
from nexus_ray.targets.encoding.selection import largest
from nexus_ray.targets.teacher import TopKTargets

_SCALE_BYTES = 4  # gap and span, a byte each, and the tail, a float16
_MOST = 32.0  # of gap and span, in nats
_CODES = 255
_NO_TAIL = -60.0  # log-probability of a tail without mass: float16 holds it exactly


class TopKEncoding(BaseModel):
    """K outcomes, ids in Elias-Fano form, log-probabilities relative to the largest in `value_bits` each.

    The most likely outcome has value 0. The others have values 1 to 2^value_bits - 1: equally spaced levels of the drop
    of their log-probability below the largest, from `gap` at the second outcome to `gap + span` at the last.

    Attributes:
        k: K.
        vocabulary: V, number of outcomes.
        value_bits: of a log-probability.
        temperature: that logits were divided by.
        prefix: of the columns' names.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    mode: Literal["topk"] = "topk"
    k: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    value_bits: int = Field(4, ge=2, le=16)
    temperature: float = Field(1.0, gt=0)
    prefix: str = "top"

    @model_validator(mode="after")
    def _kept_are_outcomes(self) -> Self:
        if self.k > self.vocabulary:
            raise ValueError(f"cannot keep the {self.k} most likely of {self.vocabulary} outcomes")
        return self

    def widths(self) -> dict[str, int]:
        """Bytes a position, by column."""
        sizes = (sorted_bytes(self.k, self.vocabulary), packed_bytes(self.k, self.value_bits), _SCALE_BYTES)
        return dict(zip(self._names(), sizes, strict=True))

    def encode(self, logits: Tensor) -> dict[str, Tensor]:
        """Keep the K most likely outcomes of softmax(logits / temperature); [positions, V] logits.

        Raises:
            ValueError: a logit is NaN or infinite, or all logits of a position are minus infinity.
        """
        values, ids, tail = in_chunks(self._keep, logits)
        drops = values.amax(-1, keepdim=True) - values
        codes, gap, span = self._codes(drops)
        scale = torch.cat([gap, span, tail.half().view(torch.uint8)], dim=-1)
        packed = (pack_sorted(ids, self.vocabulary), pack(codes, self.value_bits), scale)
        return dict(zip(self._names(), packed, strict=True))

    def decode(self, columns: Mapping[str, Tensor]) -> TopKTargets:
        """The targets of [positions, width] uint8 columns; kept outcomes and tail add up to one.

        Raises:
            ArtefactError: the bytes were not written by `encode`.
        """
        ids, values, scale = (columns[name] for name in self._names())
        gap, span = _from_byte(scale[:, :1]), _from_byte(scale[:, 1:2])
        drops = self._drops(unpack(values, self.k, self.value_bits), gap, span)
        tail = scale[:, 2:].contiguous().view(torch.float16).float()
        kept = (-tail.expm1()).log()
        log_probs = kept - drops - (-drops).logsumexp(-1, keepdim=True)
        return TopKTargets(unpack_sorted(ids, self.k, self.vocabulary), log_probs, tail.squeeze(-1))

    def _keep(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and ids [positions, K] of the most likely, and the log-probability [positions, 1] of the others."""
        scaled = tempered(logits, self.temperature)
        chances = probabilities(scaled)
        values, ids = largest(scaled, self.k)
        return values, ids, _tail_log_prob(chances, ids)

    def _codes(self, drops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values of [positions, K] drops, and the bytes of gap and span [positions, 1].

        The gap is rounded down and the span up, so that no drop is further than half a level from one.
        """
        first = drops.argmin(-1, keepdim=True)
        others = drops.scatter(-1, first, torch.inf).amin(-1, keepdim=True) if self.k > 1 else drops
        gap = _to_byte(others).floor().to(torch.uint8)
        beyond = drops - _from_byte(gap)
        span = _to_byte(beyond.amax(-1, keepdim=True)).ceil().to(torch.uint8)
        step = (_from_byte(span) / self._intervals).clamp(min=torch.finfo(torch.float32).tiny)
        codes = 1 + (beyond / step).round().clamp(min=0, max=self._intervals)
        return codes.int().scatter(-1, first, 0), gap, span

    def _drops(self, codes: Tensor, gap: Tensor, span: Tensor) -> Tensor:
        """[positions, K] drops of values; gap and span [positions, 1] in nats."""
        return torch.where(codes > 0, gap + (codes - 1) * (span / self._intervals), 0.0)

    @property
    def _intervals(self) -> int:
        return (1 << self.value_bits) - 2

    def _names(self) -> tuple[str, str, str]:
        return f"{self.prefix}_ids", f"{self.prefix}_values", f"{self.prefix}_scale"


def _tail_log_prob(chances: Tensor, ids: Tensor) -> Tensor:
    """[positions, 1] log of the probability of all but `ids`; `chances` is overwritten.

    A small tail is summed, since 1 - kept would lose its digits, and a large one is 1 - kept for the same reason.
    """
    kept = chances.gather(-1, ids).sum(-1, keepdim=True)
    tail = chances.scatter_(-1, ids, 0.0).sum(-1, keepdim=True)
    return torch.where(tail < kept, tail.log(), (-kept).log1p()).clamp(min=_NO_TAIL)


def _to_byte(nats: Tensor) -> Tensor:
    """The code, not yet a whole number, of at most 32 nats: fine steps near zero, coarse ones far away."""
    return (nats.clamp(min=0, max=_MOST) / _MOST).sqrt() * _CODES


def _from_byte(code: Tensor) -> Tensor:
    return (code.float() / _CODES).square() * _MOST
