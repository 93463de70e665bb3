"""GPT-OSS (20B, 120B): top-4 softmax routing after selection, clamped SwiGLU experts, MXFP4 or bf16 weights.

Layout and activation follow the GPT-OSS model card and transformers' `GptOssForCausalLM`: gate and up are
interleaved, MXFP4 blocks are [experts, rows, columns / 32, 16], bf16 matrices are transposed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.families.base import ExpertWeights, MoeDimensions
from nexus_ray.modeling.mxfp4 import dequantise

_SWIGLU_ALPHA = 1.702
_SWIGLU_LIMIT = 7.0


class GptOss:
    """The GPT-OSS family."""

    def dimensions(self, config: dict[str, Any]) -> MoeDimensions:
        """Sizes from `config.json`."""
        return MoeDimensions(
            layers=config["num_hidden_layers"],
            experts=config["num_local_experts"],
            experts_per_token=config["num_experts_per_tok"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
        )

    def moe_blocks(self, model: nn.Module) -> list[nn.Module]:
        """`model.layers.N.mlp`."""
        return [layer.mlp for layer in _layers(model)]

    def routers(self, model: nn.Module) -> list[nn.Module]:
        """`model.layers.N.mlp.router`."""
        return [layer.mlp.router for layer in _layers(model)]

    def router_logits(self, output: Any) -> Tensor:
        """The router returns (logits over all experts, top-k weights, top-k indices)."""
        logits: Tensor = output[0]
        return logits

    def expert_activation(self, gate: Tensor, up: Tensor, config: dict[str, Any]) -> Tensor:
        """(up + 1) * gate * sigmoid(1.702 gate), with gate clamped above and up on both sides."""
        limit = config.get("swiglu_limit", _SWIGLU_LIMIT)
        alpha = config.get("swiglu_alpha", _SWIGLU_ALPHA)
        gate = gate.clamp(max=limit)
        up = up.clamp(min=-limit, max=limit)
        return (up + 1) * gate * torch.sigmoid(alpha * gate)

    def read_expert(self, reader: CheckpointReader, layer: int, expert: int) -> ExpertWeights:
        """One expert, dequantised if packed, with gate and up de-interleaved."""
        prefix = f"model.layers.{layer}.mlp.experts"
        gate_up = _read_matrix(reader, f"{prefix}.gate_up_proj", expert)
        gate_up_bias = reader.read_slice(f"{prefix}.gate_up_proj_bias", expert).float()
        return ExpertWeights(
            gate_up=torch.cat([gate_up[0::2], gate_up[1::2]]),
            gate_up_bias=torch.cat([gate_up_bias[0::2], gate_up_bias[1::2]]),
            down=_read_matrix(reader, f"{prefix}.down_proj", expert),
            down_bias=reader.read_slice(f"{prefix}.down_proj_bias", expert).float(),
        )


def _layers(model: nn.Module) -> Any:
    return model.get_submodule("model.layers")


def _read_matrix(reader: CheckpointReader, name: str, expert: int) -> Tensor:
    """[out, in] float32 matrix of one expert, from either storage form."""
    if f"{name}_blocks" in reader:
        blocks = reader.read_slice(f"{name}_blocks", expert)
        return dequantise(blocks, reader.read_slice(f"{name}_scales", expert))
    return reader.read_slice(name, expert).float().T.contiguous()
