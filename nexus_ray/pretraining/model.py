"""A new model of the GPT-OSS architecture, of any shape."""

from __future__ import annotations

import torch
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerBase

from nexus_ray.config import ArchitectureSection


def build_config(shape: ArchitectureSection, tokenizer: PreTrainedTokenizerBase) -> GptOssConfig:
    """The transformers configuration of a model of this shape with this tokenizer's vocabulary."""
    return GptOssConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        head_dim=shape.head_dim,
        num_attention_heads=shape.attention_heads,
        num_key_value_heads=shape.key_value_heads,
        sliding_window=shape.sliding_window,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": shape.rope_theta,
            "factor": shape.rope_factor,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": int(shape.max_position_embeddings / shape.rope_factor),
        },
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_model(config: GptOssConfig, seed: int) -> GptOssForCausalLM:
    """A model with random weights that depend on the seed only."""
    torch.manual_seed(seed)
    return GptOssForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="grouped_mm")
