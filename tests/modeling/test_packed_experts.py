"""Packed experts against transformers' own experts on dequantised weights, and against finite differences."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from nexus_ray.checkpoints.mxfp4 import dequantise
from nexus_ray.families import MoeDimensions
from nexus_ray.families.gpt_oss import GptOss
from nexus_ray.modeling import recomputation
from nexus_ray.modeling.packed_experts import ExpertNorms, PackedExperts

HIDDEN, INNER, EXPERTS, TOP_K = 64, 96, 6, 2
_ACTIVATION = functools.partial(GptOss().expert_activation, config={})
_ROWS = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def packed_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (rows, columns) in _ROWS.items():
        groups = (EXPERTS, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 125, groups, generator=generator, dtype=torch.uint8)
        tensors[f"{name}_bias"] = torch.randn(EXPERTS, rows, generator=generator).bfloat16()
    return tensors


def plain_weights(dtype: torch.dtype) -> dict[str, Tensor]:
    packed = packed_weights()
    plain = {
        name: dequantise(packed[f"{name}_blocks"], packed[f"{name}_scales"]).transpose(1, 2).to(dtype) for name in _ROWS
    }
    return plain | {f"{name}_bias": packed[f"{name}_bias"].to(dtype) for name in _ROWS}


def ours(*, packed: bool = True, dtype: torch.dtype = torch.float32) -> PackedExperts:
    dimensions = MoeDimensions(1, EXPERTS, TOP_K, HIDDEN, INNER)
    experts = PackedExperts(dimensions, _ACTIVATION, packed=packed, dtype=dtype)
    experts.load_state_dict(packed_weights() if packed else plain_weights(dtype))
    return experts


def stock(dtype: torch.dtype) -> GptOssExperts:
    config = GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = "eager"
    experts = GptOssExperts(config).to(dtype).requires_grad_(False)
    experts.load_state_dict(plain_weights(dtype))
    return experts


def routed(tokens: int, dtype: torch.dtype = torch.float32, experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, selected experts (of the first `experts`) and their weights."""
    generator = torch.Generator().manual_seed(1)
    hidden_states = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    top = torch.randn(tokens, experts, generator=generator).topk(TOP_K)
    return hidden_states, top.indices, top.values.softmax(dim=-1).to(dtype)


def run(experts: nn.Module, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and the gradients of hidden states and routing weights under a fixed output gradient."""
    hidden_states, weights = hidden_states.clone().requires_grad_(), weights.clone().requires_grad_()
    output = experts(hidden_states, indices, weights)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    output.backward(gradient)
    assert hidden_states.grad is not None
    assert weights.grad is not None
    return output.detach(), hidden_states.grad, weights.grad


def cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.cosine_similarity(left.double().flatten(), right.double().flatten(), dim=0))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [1, 50])
def test_float32_equals_transformers_eager(packed: bool, tokens: int) -> None:
    inputs = routed(tokens)
    for mine, reference in zip(run(ours(packed=packed), *inputs), run(stock(torch.float32), *inputs), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_bfloat16_is_as_close_to_float32_as_the_stock_module(packed: bool) -> None:
    inputs = routed(64, torch.bfloat16)
    exact = run(stock(torch.float32), *(part.float() if part.is_floating_point() else part for part in inputs))
    mine = run(ours(packed=packed, dtype=torch.bfloat16), *inputs)
    theirs = run(stock(torch.bfloat16), *inputs)
    for ours_, stock_, reference in zip(mine, theirs, exact, strict=True):
        assert (ours_ - reference).norm() <= 1.1 * (stock_ - reference).norm()
    assert cosine(mine[1], theirs[1]) >= 0.9999


@pytest.mark.parametrize("packed", [True, False])
def test_gradients_are_those_of_finite_differences(packed: bool) -> None:
    hidden_states, indices, weights = routed(5, torch.float64)
    experts = ours(packed=packed, dtype=torch.float64 if not packed else torch.float32)
    hidden_states = (hidden_states / 4).requires_grad_()  # away from the clamp's corners
    assert torch.autograd.gradcheck(lambda x, w: experts(x, indices, w), (hidden_states, weights.requires_grad_()))


def test_skips_experts_without_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, asked = ours(), set()
    matrix = PackedExperts.matrix

    def counting(self: PackedExperts, name: str, expert: int, *rest: object) -> Tensor:
        asked.add(expert)
        return matrix(self, name, expert, *rest)

    monkeypatch.setattr(PackedExperts, "matrix", counting)
    inputs = routed(40, experts=3)
    output = run(experts, *inputs)[0]
    assert asked == {0, 1, 2}
    torch.testing.assert_close(output, run(stock(torch.float32), *inputs)[0], rtol=1e-4, atol=1e-4)


def test_no_tokens_at_all() -> None:
    assert ours()(*routed(0)).shape == (0, HIDDEN)


def test_saves_its_inputs_for_backward_and_nothing_else() -> None:
    saved: list[Tensor] = []
    hidden_states, indices, weights = routed(32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ours()(hidden_states.requires_grad_(), indices, weights.requires_grad_())
    sizes = [tensor.untyped_storage().nbytes() for tensor in saved]
    assert sum(sizes) == hidden_states.nbytes + weights.nbytes


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_computes_no_expert_a_further_time(
    monkeypatch: pytest.MonkeyPatch, tokens: int, kind: torch.dtype
) -> None:
    experts, (hidden_states, indices, weights) = ours(), routed(tokens)
    inputs = hidden_states.to(kind), indices, weights.to(kind)
    products: list[int] = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *arguments: products.append(1) or addmm(*arguments))

    class Checkpointed(nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return recomputation._run(experts, *arguments)

    reference = run(experts, *inputs)
    plain = len(products)  # gate and up, down, gate and up again
    products.clear()
    for mine, other in zip(run(Checkpointed(), *inputs), reference, strict=True):
        assert torch.equal(mine, other)
    assert len(products) == plain


def test_under_gradient_checkpointing() -> None:
    experts, inputs = ours(), routed(20)

    class Checkpointed(nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            return checkpoint(experts, *arguments, use_reentrant=False)

    for mine, reference in zip(run(Checkpointed(), *inputs), run(experts, *inputs), strict=True):
        assert torch.equal(mine, reference)


def test_under_autocast_computes_in_its_type() -> None:
    hidden_states, indices, weights = routed(32)
    experts = ours()
    with torch.autocast("cpu", torch.bfloat16):
        mine = run(experts, hidden_states, indices, weights)
    reference = run(experts, hidden_states.bfloat16(), indices, weights.bfloat16())
    assert mine[0].dtype == torch.float32
    assert torch.equal(mine[0], reference[0].float())
    assert cosine(mine[1], reference[1]) >= 0.9999


def test_under_ddp_sends_gradients_through(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(HIDDEN, HIDDEN)
            self.experts = ours()

        def forward(self, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            return self.experts(self.before(hidden_states), indices, weights)

    torch.manual_seed(0)
    block, inputs = Block(), routed(16)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        DistributedDataParallel(block)(*inputs).sum().backward()
    finally:
        dist.destroy_process_group()
    gradient = block.before.weight.grad
    block.before.weight.grad = None
    reference = stock(torch.float32)
    reference(block.before(inputs[0]), *inputs[1:]).sum().backward()
    assert gradient is not None
    assert block.before.weight.grad is not None
    torch.testing.assert_close(gradient, block.before.weight.grad, rtol=1e-3, atol=1e-3)


def test_changing_the_module_type_leaves_packed_weights_alone() -> None:
    experts = ours().to(torch.bfloat16)
    assert experts.get_parameter("gate_up_proj_blocks").dtype == torch.uint8
    assert experts.get_parameter("gate_up_proj_bias").dtype == torch.bfloat16


def test_recorded_norms_are_gate_times_output_norm() -> None:
    experts, reference, records = ours(), stock(torch.float32), list[ExpertNorms]()
    hidden_states, indices, weights = routed(9)
    with experts.recording_norms(records):
        experts(hidden_states, indices, weights)
    experts(hidden_states, indices, weights)
    assert len(records) == 1
    assert torch.equal(records[0].indices, indices)
    for token in range(9):
        for slot in range(TOP_K):
            alone = torch.zeros_like(weights[:1])
            alone[0, slot] = weights[token, slot]
            output = reference(hidden_states[token : token + 1], indices[token : token + 1], alone)
            torch.testing.assert_close(records[0].contributions[token, slot], output.norm(), rtol=1e-4, atol=1e-5)


def test_training_after_inference_in_one_thread() -> None:
    inputs = routed(8)
    experts = ours()
    with torch.inference_mode():
        expected = experts(*inputs)
    torch.testing.assert_close(run(experts, *inputs)[0], expected.clone())


def test_threads_do_not_disturb_each_other() -> None:
    experts, inputs = ours(), routed(64)
    expected = experts(*inputs)
    with ThreadPoolExecutor(4) as pool:
        for output in pool.map(lambda _: experts(*inputs), range(16)):
            assert torch.equal(output, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype: torch.dtype) -> None:
    inputs = routed(50, dtype)
    there = run(ours(dtype=dtype).cuda(), *(part.cuda() for part in inputs))
    for mine, reference in zip(there, run(ours(dtype=dtype), *inputs), strict=True):
        assert cosine(mine.cpu(), reference) >= 0.9999
