"""GPT-OSS checkpoints of true shape with random weights: they prove size and time, never quality.

Names, shapes and types are those of the published openai/gpt-oss-20b and openai/gpt-oss-120b. Random bytes come from
one pool that is read at a random offset for each expert, so that a checkpoint is written at the speed of the disk;
weights have a standard deviation near 0.02, with which activations and losses stay finite through all layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nexus_ray.checkpoints.writer import CheckpointWriter, TensorSpec

BLOCK, BLOCK_BYTES = 32, 16
NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
_POOL_VALUES = 1 << 25
_PIECE_VALUES = _POOL_VALUES // 4  # larger tensors are joined from pieces
_STD = 0.02
# The values of random nibbles have a root mean square of 2.93, so these scale bytes give weights of about 0.018.
_SCALE_BYTES = (119, 121)
Experts = Sequence[Sequence[int]] | None  # of each layer; None: all


@dataclass(frozen=True)
class TrueShape:
    """Sizes of a GPT-OSS model."""

    layers: int
    experts: int
    hidden_size: int = 2880
    intermediate_size: int = 2880
    experts_per_token: int = 4
    attention_heads: int = 64
    key_value_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 201_088

    def config(self) -> dict[str, Any]:
        """`config.json`, as published."""
        kinds = ("sliding_attention", "full_attention")
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "attention_bias": True,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "eos_token_id": 200002,
            "pad_token_id": 199999,
            "experts_per_token": self.experts_per_token,
            "num_experts_per_tok": self.experts_per_token,
            "num_local_experts": self.experts,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initial_context_length": 4096,
            "initializer_range": _STD,
            "intermediate_size": self.intermediate_size,
            "layer_types": [kinds[layer % 2] for layer in range(self.layers)],
            "max_position_embeddings": 131_072,
            "num_attention_heads": self.attention_heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_value_heads,
            "output_router_logits": False,
            "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED},
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "rope_theta": 150_000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }


SHAPES = {"gpt-oss-20b": TrueShape(layers=24, experts=32), "gpt-oss-120b": TrueShape(layers=36, experts=128)}


def expert_specs(prefix: str, shape: TrueShape) -> list[TensorSpec]:
    """Tensors of one layer's routed experts: packed matrices [experts, rows, columns / 32, 16] and biases."""
    specs = []
    hidden, inner = shape.hidden_size, shape.intermediate_size
    for name, rows, columns in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        groups = (shape.experts, rows, columns // BLOCK)
        specs += [
            TensorSpec(f"{prefix}.{name}_blocks", torch.uint8, (*groups, BLOCK_BYTES)),
            TensorSpec(f"{prefix}.{name}_scales", torch.uint8, groups),
            TensorSpec(f"{prefix}.{name}_bias", torch.bfloat16, (shape.experts, rows)),
        ]
    return specs


def layer_specs(layer: int, shape: TrueShape) -> list[TensorSpec]:
    """Tensors of one decoder layer."""
    prefix, hidden = f"model.layers.{layer}", shape.hidden_size
    heads, key_values = shape.attention_heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    plain: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.sinks": (shape.attention_heads,),
        "mlp.router.weight": (shape.experts, hidden),
        "mlp.router.bias": (shape.experts,),
    }
    for name, rows, columns in (("q", heads, hidden), ("k", key_values, hidden), ("v", key_values, hidden)):
        plain |= {f"self_attn.{name}_proj.weight": (rows, columns), f"self_attn.{name}_proj.bias": (rows,)}
    plain |= {"self_attn.o_proj.weight": (hidden, heads), "self_attn.o_proj.bias": (hidden,)}
    specs = [TensorSpec(f"{prefix}.{name}", torch.bfloat16, size) for name, size in plain.items()]
    return specs + expert_specs(f"{prefix}.mlp.experts", shape)


def checkpoint_specs(shape: TrueShape) -> list[TensorSpec]:
    """Every tensor, in file order."""
    table = (shape.vocabulary, shape.hidden_size)
    specs = [TensorSpec("model.embed_tokens.weight", torch.bfloat16, table)]
    for layer in range(shape.layers):
        specs += layer_specs(layer, shape)
    specs.append(TensorSpec("model.norm.weight", torch.bfloat16, (shape.hidden_size,)))
    return [*specs, TensorSpec("lm_head.weight", torch.bfloat16, table)]


def filled_slices(spec: TensorSpec, experts: Experts) -> list[int] | None:
    """Entries of the first dimension that are written; None for the whole tensor."""
    if not spec.name.endswith(("_blocks", "_scales")):
        return None
    return list(range(spec.shape[0])) if experts is None else sorted(experts[int(spec.name.split(".")[2])])


def filled_bytes(specs: Sequence[TensorSpec], experts: Experts) -> int:
    """Bytes of disk that the written parts take; the others stay holes of sparse files."""
    total = 0
    for spec in specs:
        slices = filled_slices(spec, experts)
        total += spec.nbytes if slices is None else spec.nbytes // spec.shape[0] * len(slices)
    return total


class RandomPool:
    """Random weights read from one pool at random offsets; a pure function of the seed and the order of calls."""

    def __init__(self, seed: int, values: int = _POOL_VALUES) -> None:
        generator = torch.Generator().manual_seed(seed)
        low, high = _SCALE_BYTES
        self._bytes = torch.randint(0, 256, (values,), dtype=torch.uint8, generator=generator)
        self._scales = torch.randint(low, high, (values,), dtype=torch.uint8, generator=generator)
        self._normal = (torch.randn(values, generator=generator) * _STD).bfloat16()
        self._generator = generator

    def tensor(self, spec: TensorSpec, shape: tuple[int, ...]) -> Tensor:
        """A random part of tensor `spec`; norms are ones."""
        if spec.name.endswith(("layernorm.weight", "model.norm.weight")):
            return torch.ones(shape, dtype=spec.dtype)
        pool = self._normal
        if spec.dtype == torch.uint8:
            pool = self._bytes if spec.name.endswith("_blocks") else self._scales
        whole, rest = divmod(prod(shape), _PIECE_VALUES)
        pieces = [self._piece(pool, size) for size in [_PIECE_VALUES] * whole + [rest]]
        return (torch.cat(pieces) if whole else pieces[0]).view(shape)

    def _piece(self, pool: Tensor, size: int) -> Tensor:
        start = int(torch.randint(0, len(pool) - size + 1, (), generator=self._generator))
        return pool[start : start + size]


def fill(writer: CheckpointWriter, spec: TensorSpec, experts: Experts, pool: RandomPool) -> None:
    """Write one tensor, packed experts one at a time."""
    slices = filled_slices(spec, experts)
    if slices is None:
        writer.write(spec.name, pool.tensor(spec, spec.shape))
        return
    for index in slices:
        writer.write_slice(spec.name, index, pool.tensor(spec, spec.shape[1:]))


def write_true_shape(
    directory: Path, shape: TrueShape, experts: Experts, seed: int, advance: Callable[[int], None]
) -> None:
    """Write config, tensors and generation settings into an existing directory.

    Args:
        directory: where.
        shape: sizes of the model.
        experts: experts of each layer whose weights are written; None writes all.
        seed: of the random weights.
        advance: told after each tensor.
    """
    pool = RandomPool(seed)
    specs = checkpoint_specs(shape)
    with CheckpointWriter(directory, specs, holes=experts is not None) as writer:
        for spec in specs:
            fill(writer, spec, experts, pool)
            advance(1)
    generation = {"bos_token_id": 199998, "eos_token_id": [200002, 199999, 200012], "pad_token_id": 199999}
    (directory / "generation_config.json").write_text(json.dumps(generation | {"do_sample": True}, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
