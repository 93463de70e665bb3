"""Sizes of a model that is not here yet: GPT-OSS as its makers published it, or a directory with `config.json` alone.

Whoever plans for a cluster has often not downloaded 61 GB. What decides sizes follows from the configuration: names,
shapes and types of the tensors are those of the published checkpoints (MXFP4 experts, everything else bfloat16).
Sources: the `config.json` of huggingface.co/openai/gpt-oss-20b and gpt-oss-120b.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nexus_ray.checkpoints.header import TensorSpec
from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.errors import ModelError
from nexus_ray.planning.sizes import ModelSizes, read_sizes, sizes_of
from nexus_ray.storage import Place, exists, is_remote

_BLOCK, _BLOCK_BYTES = 32, 16  # values of an MXFP4 block, and their bytes
PUBLISHED = "the published configuration"
CONFIGURATION = "config.json alone"


def _configuration(layers: int, experts: int) -> dict[str, Any]:
    """What both models' `config.json` says of sizes."""
    return {
        "model_type": "gpt_oss",
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201_088,
        "sliding_window": 128,
        "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)],
        "max_position_embeddings": 131_072,
    }


CONFIGURATIONS = {"gpt-oss-20b": _configuration(24, 32), "gpt-oss-120b": _configuration(36, 128)}


def model_sizes(path: Place) -> ModelSizes:
    """Sizes of the model in a directory; of one that is not there, or has no tensors yet, as far as they are known.

    Raises:
        ModelError: it is damaged or of an unsupported family; or it is not there and its name is not that of a
            published model.
    """
    # An object store has no directories: there a model is where its configuration is.
    name, here = published_name(path), exists(path / "config.json" if is_remote(path) else path)
    if not here and name is not None:
        config = CONFIGURATIONS[name]
        return sizes_of(config, gpt_oss_specs(config), path=path, origin=f"{PUBLISHED} of {name}")
    if exists(path / "config.json") and not any(
        exists(path / name) for name in ("model.safetensors", "model.safetensors.index.json")
    ):
        config = read_model_config(path)
        if config.get("model_type") == "gpt_oss" and not config.get("tie_word_embeddings"):
            return sizes_of(config, _complete(config, path), path=path, origin=CONFIGURATION)
    try:
        return read_sizes(path)
    except ModelError as error:
        if here:
            raise
        known = " or ".join(CONFIGURATIONS)
        hint = f"set model.path to a model directory, or plan ahead with one named {known}"
        raise ModelError(error.message, hint) from error


def published_name(path: Place) -> str | None:
    """The published model that a directory's name stands for; None where it stands for none."""
    return next((name for name in CONFIGURATIONS if path.name.lower() == name), None)


def _complete(config: dict[str, Any], path: Place) -> list[TensorSpec]:
    """The tensors that a configuration describes."""
    try:
        return list(gpt_oss_specs(config))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model.path: {path}/config.json lacks or garbles {error}", "download it again") from error


def gpt_oss_specs(config: dict[str, Any]) -> Iterator[TensorSpec]:
    """Every tensor of a GPT-OSS checkpoint of this configuration, as published."""
    table = (int(config["vocab_size"]), int(config["hidden_size"]))
    yield TensorSpec("model.embed_tokens.weight", torch.bfloat16, table)
    for layer in range(int(config["num_hidden_layers"])):
        yield from _layer_specs(config, f"model.layers.{layer}")
    yield TensorSpec("model.norm.weight", torch.bfloat16, table[1:])
    yield TensorSpec("lm_head.weight", torch.bfloat16, table)


def _layer_specs(config: dict[str, Any], prefix: str) -> Iterator[TensorSpec]:
    hidden, experts = int(config["hidden_size"]), int(config["num_local_experts"])
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    queries, keys = heads * head_dim, int(config.get("num_key_value_heads") or heads) * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.sinks": (heads,),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.o_proj.bias": (hidden,),
        "mlp.router.weight": (experts, hidden),
        "mlp.router.bias": (experts,),
    }
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        shapes |= {f"self_attn.{name}_proj.weight": (rows, hidden), f"self_attn.{name}_proj.bias": (rows,)}
    for name, shape in shapes.items():
        yield TensorSpec(f"{prefix}.{name}", torch.bfloat16, shape)
    inner = int(config["intermediate_size"])
    for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        groups = (experts, rows, columns // _BLOCK)
        yield TensorSpec(f"{prefix}.mlp.experts.{name}_blocks", torch.uint8, (*groups, _BLOCK_BYTES))
        yield TensorSpec(f"{prefix}.mlp.experts.{name}_scales", torch.uint8, groups)
        yield TensorSpec(f"{prefix}.mlp.experts.{name}_bias", torch.bfloat16, (experts, rows))
