"""The trap: transformers' native MXFP4 path swaps every MoE block for another module after the model is built.

Its real replacement code runs here; only the Triton kernels, which need a GPU, are stood in for: routing hands the
logits over and the experts compute what the stock ones do.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssForCausalLM, Mxfp4Config
from transformers.integrations import hub_kernels, mxfp4

from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.huggingface.merge_check import check_model
from nexus_ray.huggingface.modeling import NexusGptOssForCausalLM
from nexus_ray.modeling.shared_expert import SharedExperts, SharedExpertShape

_EAGER = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}


def go_native(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `from_pretrained` does to a model on a GPU with kernels."""
    routing = SimpleNamespace(routing=lambda logits, top_k: ((logits, top_k), None, None))
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: SimpleNamespace(routing=routing))
    before = [layer.mlp for layer in model.model.layers]
    mxfp4.replace_with_mxfp4_linear(model, Mxfp4Config(dequantize=False))
    for layer, block in zip(model.model.layers, before, strict=True):
        assert type(layer.mlp) is mxfp4.Mxfp4GptOssMLP
        assert not layer.mlp._forward_hooks
        layer.mlp.experts.forward_routed = _Stock(block.experts)


class _Stock:
    """The kernels' part: top-k of the router logits, then the experts."""

    def __init__(self, experts: torch.nn.Module) -> None:
        self.experts = experts

    def __call__(self, hidden_states: torch.Tensor, routing: Any, *_: Any) -> torch.Tensor:
        logits, top_k = routing
        values, indices = logits.topk(top_k, dim=-1)
        return self.experts(hidden_states, indices, values.softmax(dim=-1))


@torch.no_grad()
def _logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture
def model(exported: Path) -> NexusGptOssForCausalLM:
    return AutoModelForCausalLM.from_pretrained(exported, **_EAGER)


@pytest.mark.parametrize("used_before", [False, True])
def test_shared_experts_survive_the_replacement(model, input_ids, used_before, monkeypatch) -> None:
    twin = AutoModelForCausalLM.from_pretrained(model.name_or_path, **_EAGER)
    expected = _logits(twin, input_ids)
    if used_before:
        _logits(model, input_ids)
    go_native(model, monkeypatch)
    assert torch.equal(_logits(model, input_ids), expected)
    assert torch.equal(_logits(model, input_ids), expected), "added once, not once a forward pass"
    with model.shared_experts_off(), twin.shared_experts_off():
        off = _logits(model, input_ids)
        assert torch.equal(off, _logits(twin, input_ids))
    assert not torch.equal(off, expected)


def test_every_shared_tensor_matters_after_the_replacement(model, exported: Path, monkeypatch) -> None:
    go_native(model, monkeypatch)
    with CheckpointReader(exported) as reader:
        report = check_model(model, model.shared_tensors(), reader.read)
    assert report.problems == []
    assert len(report.tensors) == 14


def test_hooks_on_the_block_alone_are_lost(micro_model: Path, input_ids: torch.Tensor, monkeypatch) -> None:
    """Why the decoder layer looks after its block: the trap is real."""
    stock = GptOssForCausalLM.from_pretrained(micro_model, **_EAGER)
    base = _logits(stock, input_ids)
    torch.manual_seed(0)
    experts = SharedExperts(2, SharedExpertShape(64, 64, True), lambda gate, up: gate * up)
    experts.attach([layer.mlp for layer in stock.model.layers])
    assert not torch.equal(_logits(stock, input_ids), base)
    go_native(stock, monkeypatch)
    assert torch.equal(_logits(stock, input_ids), base)
