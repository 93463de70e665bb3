"""Claim: packed experts compute as fast as memory allows at a quarter of the weights' size; here is the price.

One layer of GPT-OSS 20B shape (32 experts, top-4, hidden and intermediate size 2880) runs forward, and forward with
backward to the inputs, as `PackedExperts` on MXFP4 weights and as transformers' eager and grouped implementations on
the same weights in bfloat16. Implementations take turns; the figures are medians. Memory is what the weights take
and the largest anonymous memory above it while it runs. The last line is one JSON object.

    python benchmarks/packed_vs_stock.py
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _common import MemoryPeak, command_line, print_result
from torch import Tensor, nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from nexus_ray.checkpoints.mxfp4 import dequantise
from nexus_ray.families import MoeDimensions
from nexus_ray.families.gpt_oss import GptOss
from nexus_ray.modeling.packed_experts import PackedExperts

_STOCK = ("eager", "grouped_mm")
_PARTS = ("forward", "forward_backward")
_MATRICES = ("gate_up_proj", "down_proj")


def packed_layer(dimensions: MoeDimensions) -> PackedExperts:
    """A layer with random MXFP4 weights of standard deviation near 0.02."""
    activation = functools.partial(GptOss().expert_activation, config={})
    experts = PackedExperts(dimensions, activation, packed=True)
    for name, tensor in experts.state_dict().items():
        if name.endswith("blocks"):
            tensor.random_(0, 256)
        elif name.endswith("scales"):
            tensor.random_(119, 122)
        else:
            tensor.normal_(std=0.02)
    return experts


def stock_layer(packed: PackedExperts, dimensions: MoeDimensions, implementation: str) -> nn.Module:
    """transformers' experts with the same weights, dequantised to bfloat16."""
    config = GptOssConfig(
        hidden_size=dimensions.hidden_size,
        intermediate_size=dimensions.intermediate_size,
        num_local_experts=dimensions.experts,
        num_experts_per_tok=dimensions.experts_per_token,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = GptOssExperts(config)
    state = packed.state_dict()
    weights = {f"{name}_bias": state[f"{name}_bias"] for name in _MATRICES}
    for name in _MATRICES:
        blocks, scales = state[f"{name}_blocks"], state[f"{name}_scales"]
        weights[name] = torch.stack(
            [dequantise(block, scale, torch.bfloat16).T for block, scale in zip(blocks, scales, strict=True)]
        )
    experts.load_state_dict(weights, assign=True)
    return experts.requires_grad_(False)


def inputs(tokens: int, dimensions: MoeDimensions) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, selected experts and routing weights."""
    generator = torch.Generator().manual_seed(tokens)
    hidden_states = torch.randn(tokens, dimensions.hidden_size, generator=generator).bfloat16()
    top = torch.randn(tokens, dimensions.experts, generator=generator).topk(dimensions.experts_per_token)
    return hidden_states, top.indices, top.values.softmax(dim=-1).bfloat16()


def forward(experts: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The output, without gradients."""
    with torch.no_grad():
        return experts(*arguments)


def forward_backward(experts: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The gradient of the hidden states."""
    hidden_states, indices, weights = arguments
    hidden_states = hidden_states.clone().requires_grad_()
    output = experts(hidden_states, indices, weights.clone().requires_grad_())
    output.backward(torch.ones_like(output))
    assert hidden_states.grad is not None
    return hidden_states.grad


def seconds(work: Callable[[], Tensor]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(layers: dict[str, nn.Module], tokens: int, dimensions: MoeDimensions, repeats: int) -> dict[str, Any]:
    """Tokens/s and transient bytes of each implementation, and how far each is from the first."""
    arguments = inputs(tokens, dimensions)
    work = {
        (name, part): functools.partial(globals()[part], layer, arguments)
        for name, layer in layers.items()
        for part in _PARTS
    }
    transient, cosine = {}, {}
    for (name, part), call in work.items():  # also the warm-up
        with MemoryPeak() as peak:
            result = call()
        transient[name, part] = peak.transient
        reference = work["packed", part]()
        cosine[name, part] = float(torch.cosine_similarity(result.double().flatten(), reference.double().flatten(), 0))
    rounds = [{key: seconds(call) for key, call in work.items()} for _ in range(repeats)]
    times = {key: statistics.median(turn[key] for turn in rounds) for key in work}
    return {
        part: {
            name: {
                "tokens_per_second": round(tokens / times[name, part], 1),
                "transient_bytes": transient[name, part],
                "cosine_with_packed": cosine[name, part],
                "packed_speed_ratio": round(times[name, part] / times["packed", part], 3),
            }
            for name in layers
        }
        for part in _PARTS
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256, 1024, 4096], help="tokens of a pass")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    parser.add_argument("--experts", type=int, default=32, help="experts of the layer")
    parser.add_argument("--size", type=int, default=2880, help="hidden and intermediate size")
    arguments = parser.parse_args()
    dimensions = MoeDimensions(1, arguments.experts, 4, arguments.size, arguments.size)
    torch.manual_seed(0)
    packed = packed_layer(dimensions)
    layers: dict[str, nn.Module] = {"packed": packed}
    layers |= {name: stock_layer(packed, dimensions, name) for name in _STOCK}
    results = {}
    for tokens in arguments.tokens:
        results[str(tokens)] = measure(layers, tokens, dimensions, arguments.repeats)
        for part, rows in results[str(tokens)].items():
            line = ", ".join(f"{name} {row['tokens_per_second']:,.0f} tokens/s" for name, row in rows.items())
            print(f"{tokens} tokens, {part}: {line}", flush=True)
    weights = {name: sum(p.nbytes for p in layer.parameters()) for name, layer in layers.items()}
    print_result(
        {
            "benchmark": "packed_vs_stock",
            "layer": vars(arguments) | {"top_k": 4, "dtype": "bfloat16"},
            "threads": torch.get_num_threads(),
            "weight_bytes": weights,
            "by_tokens": results,
        }
    )


if __name__ == "__main__":
    with command_line():
        main()
