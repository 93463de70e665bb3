"""Writing a GPT-OSS model as a Hugging Face directory with MXFP4 experts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GptOssForCausalLM

from nexus_ray.modeling.mxfp4 import quantise
from nexus_ray.storage import atomic_directory

_EXPERT_MATRICES = ("gate_up_proj", "down_proj")
_NOT_CONVERTED = [
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
]


def export_mxfp4(model: GptOssForCausalLM, tokenizer: Path, output: Path) -> None:
    """Write `model` with packed experts and everything else in bfloat16, beside the tokenizer's files.

    The names and shapes are those of the published GPT-OSS checkpoints, so stock transformers loads it.

    Args:
        model: a model with unpacked experts.
        tokenizer: directory whose tokenizer files and chat template are copied.
        output: directory to write, atomically; may be the tokenizer's.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(_EXPERT_MATRICES):
            blocks, scales = quantise(tensor.transpose(1, 2))
            tensors |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
        else:
            tensors[name] = tensor.to(torch.bfloat16).contiguous()
    config = model.config.to_dict() | {"dtype": "bfloat16", "architectures": ["GptOssForCausalLM"]}
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": _NOT_CONVERTED}
    with atomic_directory(output) as temporary:
        for file in sorted(tokenizer.iterdir()):
            if file.suffix in (".json", ".jinja") and file.name.startswith(("tokenizer", "chat", "special")):
                shutil.copyfile(file, temporary / file.name)
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
        model.generation_config.save_pretrained(temporary)
