"""GPT-OSS (20B, 120B): top-4 softmax routing after selection, clamped SwiGLU experts, MXFP4 or bf16 weights.

Layout and activation follow the GPT-OSS model card and transformers' `GptOssForCausalLM`: gate and up are
interleaved, MXFP4 blocks are [experts, rows, columns / 32, 16], bf16 matrices are transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_ray.checkpoints.mxfp4 import BLOCK, dequantise
from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.errors import ModelError
from nexus_ray.families.base import ExpertParts, MoeDimensions, MoeFamily, StoredPart

_SWIGLU_ALPHA = 1.702
_SWIGLU_LIMIT = 7.0


class GptOss(MoeFamily):
    """The GPT-OSS family."""

    def dimensions(self, config: dict[str, Any]) -> MoeDimensions:
        """Sizes from `config.json`."""
        try:
            return MoeDimensions(
                layers=int(config["num_hidden_layers"]),
                experts=int(config["num_local_experts"]),
                experts_per_token=int(config["num_experts_per_tok"]),
                hidden_size=int(config["hidden_size"]),
                intermediate_size=int(config["intermediate_size"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"model.path: config.json lacks or garbles {error}", "download it again") from error

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """`model.layers.N`."""
        return list(model.get_submodule("model.layers").children())

    def moe_blocks(self, model: nn.Module) -> list[nn.Module]:
        """`model.layers.N.mlp`."""
        return [layer.get_submodule("mlp") for layer in self.layers(model)]

    def routers(self, model: nn.Module) -> list[nn.Module]:
        """`model.layers.N.mlp.router`."""
        return [layer.get_submodule("mlp.router") for layer in self.layers(model)]

    def router_name(self, layer: int) -> str:
        """`model.layers.N.mlp.router`."""
        return f"model.layers.{layer}.mlp.router"

    def router_logits(self, output: Any) -> Tensor:
        """The router returns (logits over all experts, top-k weights, top-k indices)."""
        logits: Tensor = output[0]
        return logits

    def route(self, router: nn.Module, hidden_states: Tensor, weight: Tensor, bias: Tensor) -> Any:
        """A linear layer, the k largest logits, and the softmax over these."""
        logits = F.linear(hidden_states, weight, bias)
        values, indices = torch.topk(logits, cast(int, router.top_k), dim=-1)
        return logits, torch.softmax(values, dim=-1, dtype=values.dtype), indices

    def expert_activation(self, gate: Tensor, up: Tensor, config: dict[str, Any]) -> Tensor:
        """(up + 1) * gate * sigmoid(1.702 gate), with gate clamped above and up on both sides."""
        limit = config.get("swiglu_limit", _SWIGLU_LIMIT)
        alpha = config.get("swiglu_alpha", _SWIGLU_ALPHA)
        gate = gate.clamp(max=limit)
        up = up.clamp(min=-limit, max=limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)

    def expert_parts(self, reader: CheckpointReader, layer: int) -> ExpertParts:
        """`model.layers.N.mlp.experts.*`, dequantised if packed, with gate and up de-interleaved by `arrange`."""
        prefix = f"model.layers.{layer}.mlp.experts"
        return ExpertParts(
            gate_up=_matrix(reader, f"{prefix}.gate_up_proj", _deinterleave),
            gate_up_bias=_bias(reader, f"{prefix}.gate_up_proj_bias", _deinterleave),
            down=_matrix(reader, f"{prefix}.down_proj", _unchanged),
            down_bias=_bias(reader, f"{prefix}.down_proj_bias", _unchanged),
        )


def _deinterleave(rows: Tensor) -> Tensor:
    """Gate and up alternate in storage; put the gate's rows before the up projection's."""
    return torch.cat([rows[0::2], rows[1::2]])


def _unchanged(rows: Tensor) -> Tensor:
    return rows


def _matrix(reader: CheckpointReader, name: str, arrange: Callable[[Tensor], Tensor]) -> StoredPart:
    """A projection in either storage form: MXFP4 [experts, out, in / 32, 16], or bf16 [experts, in, out]."""
    return _packed(reader, name, arrange) if f"{name}_blocks" in reader else _plain(reader, name, arrange)


def _packed(reader: CheckpointReader, name: str, arrange: Callable[[Tensor], Tensor]) -> StoredPart:
    blocks, scales = f"{name}_blocks", f"{name}_scales"
    experts, rows, groups = reader.shape(scales)

    def read_rows(expert: int, start: int, stop: int) -> Tensor:
        # float32 directly: exact, and one conversion less than bfloat16 for a sum in float32
        return dequantise(
            reader.read_rows(blocks, expert, start, stop),
            reader.read_rows(scales, expert, start, stop),
            torch.float32,
        )

    stored_bytes = _bytes_per_expert(reader, blocks) + _bytes_per_expert(reader, scales)
    return StoredPart(blocks, experts, (rows, groups * BLOCK), stored_bytes, read_rows, arrange)


def _plain(reader: CheckpointReader, name: str, arrange: Callable[[Tensor], Tensor]) -> StoredPart:
    experts, *shape = reader.shape(name)
    return StoredPart(
        name,
        experts,
        tuple(shape),
        _bytes_per_expert(reader, name),
        lambda expert, start, stop: reader.read_rows(name, expert, start, stop).float(),
        lambda rows: arrange(rows.T).contiguous(),
    )


def _bias(reader: CheckpointReader, name: str, arrange: Callable[[Tensor], Tensor]) -> StoredPart:
    experts, size = reader.shape(name)
    return StoredPart(
        name,
        experts,
        (size,),
        _bytes_per_expert(reader, name),
        lambda expert, start, stop: reader.read_slice(name, expert)[start:stop].float(),
        arrange,
    )


def _bytes_per_expert(reader: CheckpointReader, name: str) -> int:
    entry = reader.entry(name)
    return (entry.stop - entry.start) // entry.shape[0]
