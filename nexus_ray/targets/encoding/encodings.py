"""The encodings of next-token distributions, one a mode of a target set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from nexus_ray.targets.encoding.bits import pack_sorted, sorted_bytes, unpack_sorted
from nexus_ray.targets.encoding.chunks import in_chunks, probabilities, tempered
from nexus_ray.targets.encoding.top_k import TopKEncoding
from nexus_ray.targets.teacher import HiddenTargets, SampledTargets

_FLOAT32 = 4
_LEAST_LOGIT = -1e4  # below the largest: its probability is zero in float32


class SampledEncoding(BaseModel):
    """Draws from the teacher's distribution.

    They are systematic: N points at equal distances, all moved by one random offset, on the cumulative distribution
    (Kitagawa 1996; Carpenter, Clifford & Fearnhead 1999). Every token is drawn N * p times on average, as in
    independent draws, and never further from that than one draw, so that means over draws vary less.

    Attributes:
        draws: N, at each position.
        vocabulary: V.
        temperature: that logits were divided by.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    mode: Literal["sampled"] = "sampled"
    draws: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    temperature: float = Field(1.0, gt=0)

    def widths(self) -> dict[str, int]:
        """Bytes a position, by column."""
        return {"draws": sorted_bytes(self.draws, self.vocabulary), "entropy": _FLOAT32}

    def encode(self, logits: Tensor, offsets: Tensor) -> dict[str, Tensor]:
        """Draw from softmax(logits / temperature).

        Args:
            logits: [positions, V].
            offsets: [positions] float64 in [0, 1), uniformly random.

        Raises:
            ValueError: a logit is NaN or infinite, or all logits of a position are minus infinity.
        """
        ids, entropy = in_chunks(self._draw, logits, offsets)
        return {"draws": pack_sorted(ids, self.vocabulary), "entropy": entropy.view(torch.uint8)}

    def decode(self, columns: Mapping[str, Tensor]) -> SampledTargets:
        """The targets of [positions, width] uint8 columns.

        Raises:
            ArtefactError: the bytes were not written by `encode`.
        """
        ids = unpack_sorted(columns["draws"], self.draws, self.vocabulary)
        return SampledTargets(ids, columns["entropy"].contiguous().view(torch.float32).squeeze(-1))

    def _draw(self, logits: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [positions, N], ascending, and the entropy [positions, 1] of what they were drawn from."""
        scaled = tempered(logits, self.temperature)
        centred = (scaled - scaled.amax(-1, keepdim=True)).clamp(min=_LEAST_LOGIT)
        chances = probabilities(centred)
        entropy = -torch.linalg.vecdot(chances, centred).unsqueeze(-1) - chances.amax(-1, keepdim=True).log()
        return systematic_draws(chances, self.draws, offsets), entropy


def systematic_draws(chances: Tensor, draws: int, offsets: Tensor) -> Tensor:
    """[positions, draws] int64 outcomes, ascending; none has chance zero.

    Args:
        chances: [positions, outcomes], of any sum.
        draws: N.
        offsets: [positions] float64 in [0, 1).
    """
    cumulative = chances.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    points = (torch.arange(draws, device=chances.device) + offsets.unsqueeze(-1)) / draws * total
    # Rounding may lift the last point to the total, where no outcome is.
    points = torch.minimum(points, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, points, right=True)


class HiddenEncoding(BaseModel):
    """Final hidden states, from which the frozen LM head makes the whole distribution.

    The low and the high bytes of bfloat16 are columns of their own: the high ones, sign and exponent, compress well.

    Attributes:
        hidden_size: of the model.
        dtype: as they are stored; float8 is e4m3 with a float32 scale a position.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    mode: Literal["hidden"] = "hidden"
    hidden_size: int = Field(ge=1)
    dtype: Literal["bfloat16", "float8"] = "bfloat16"

    def widths(self) -> dict[str, int]:
        """Bytes a position, by column."""
        if self.dtype == "bfloat16":
            return {"hidden_low": self.hidden_size, "hidden_high": self.hidden_size}
        return {"hidden": self.hidden_size, "hidden_scale": _FLOAT32}

    def encode(self, hidden: Tensor) -> dict[str, Tensor]:
        """Store [positions, hidden] states.

        Raises:
            ValueError: one is NaN or infinite.
        """
        if not bool(hidden.isfinite().all()):
            raise ValueError("hidden states are NaN or infinite")
        if self.dtype == "bfloat16":
            both = hidden.bfloat16().contiguous().view(torch.uint8).unflatten(-1, (-1, 2))
            return {"hidden_low": both[..., 0].contiguous(), "hidden_high": both[..., 1].contiguous()}
        values = hidden.float()
        most = torch.finfo(torch.float8_e4m3fn).max
        scale = (values.abs().amax(-1, keepdim=True) / most).clamp(min=torch.finfo(torch.float32).tiny)
        stored = (values / scale).clamp(-most, most).to(torch.float8_e4m3fn)
        return {"hidden": stored.view(torch.uint8), "hidden_scale": scale.view(torch.uint8)}

    def decode(self, columns: Mapping[str, Tensor]) -> HiddenTargets:
        """The targets of [positions, width] uint8 columns, in the stored type; float8 in float32."""
        if self.dtype == "bfloat16":
            both = torch.stack([columns["hidden_low"], columns["hidden_high"]], dim=-1)
            return HiddenTargets(both.flatten(-2).view(torch.bfloat16))
        scale = columns["hidden_scale"].contiguous().view(torch.float32)
        return HiddenTargets(columns["hidden"].contiguous().view(torch.float8_e4m3fn).float() * scale)


OutputEncoding = Annotated[TopKEncoding | SampledEncoding | HiddenEncoding, Field(discriminator="mode")]
