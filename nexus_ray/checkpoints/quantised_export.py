"""Writing a GPT-OSS model as a Hugging Face directory with MXFP4 experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import GptOssForCausalLM

from nexus_ray.checkpoints.header import TensorSpec
from nexus_ray.checkpoints.mxfp4 import BLOCK, quantise
from nexus_ray.checkpoints.writer import CheckpointWriter
from nexus_ray.storage import atomic_directory

_EXPERT_MATRICES = ("gate_up_proj", "down_proj")
_SHARD_BYTES = 5_000_000_000
_NOT_CONVERTED = [
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
]


def export_mxfp4(model: GptOssForCausalLM, tokenizer: Path, output: Path, *, shard_bytes: int = _SHARD_BYTES) -> None:
    """Write `model` with packed experts and everything else in bfloat16, beside the tokenizer's files.

    The names and shapes are those of the published GPT-OSS checkpoints, so stock transformers loads it. Beyond the
    model itself it takes the memory of one packed expert.

    Args:
        model: a model with unpacked experts, whose sizes are divisible by 32.
        tokenizer: directory whose tokenizer files and chat template are copied.
        output: directory to write, atomically; may be the tokenizer's.
        shard_bytes: most bytes of tensors in one file.
    """
    tensors: dict[str, Tensor] = model.state_dict()
    specs = [spec for name, tensor in tensors.items() for spec in _stored_as(name, tensor)]
    config = model.config.to_dict() | {"dtype": "bfloat16", "architectures": ["GptOssForCausalLM"]}
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": _NOT_CONVERTED}
    with atomic_directory(output) as temporary:
        for file in sorted(tokenizer.iterdir()):
            if file.suffix in (".json", ".jinja") and file.name.startswith(("tokenizer", "chat", "special")):
                shutil.copyfile(file, temporary / file.name)
        with CheckpointWriter(temporary, specs, shard_bytes=shard_bytes) as writer:
            for name, tensor in tensors.items():
                _write(writer, name, tensor)
        (temporary / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
        model.generation_config.save_pretrained(temporary)


def _stored_as(name: str, tensor: Tensor) -> list[TensorSpec]:
    """What one of the model's tensors becomes in the files."""
    if not name.endswith(_EXPERT_MATRICES):
        return [TensorSpec(name, torch.bfloat16, tuple(tensor.shape))]
    experts, columns, rows = tensor.shape
    shape = (experts, rows, columns // BLOCK)
    blocks = TensorSpec(f"{name}_blocks", torch.uint8, (*shape, BLOCK // 2))
    return [blocks, TensorSpec(f"{name}_scales", torch.uint8, shape)]


def _write(writer: CheckpointWriter, name: str, tensor: Tensor) -> None:
    if not name.endswith(_EXPERT_MATRICES):
        writer.write(name, tensor.to(torch.bfloat16))
        return
    for expert, matrix in enumerate(tensor):
        blocks, scales = quantise(matrix.T)
        writer.write_slice(f"{name}_blocks", expert, blocks)
        writer.write_slice(f"{name}_scales", expert, scales)
