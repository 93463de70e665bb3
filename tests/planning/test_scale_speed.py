"""Operations and kernels of the scale model, against PyTorch's own counts of the real model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nexus_ray.config import ModelSection
from nexus_ray.families import MoeDimensions
from nexus_ray.modeling.loading import LoadedModel, load_student
from nexus_ray.modeling.packed_experts import PackedExperts
from nexus_ray.planning.hardware import GPUS
from nexus_ray.planning.published import model_sizes
from nexus_ray.planning.scale import figures
from nexus_ray.planning.scale.flops import token_flop
from nexus_ray.planning.scale.speed import BatchTime, GpuSpeed

LENGTH, WIDTH = 48, 48
# Operations of PyTorch that only describe memory that is there.
_VIEWS = {
    *("alias", "as_strided", "detach", "empty", "expand", "permute", "promote_types", "reshape", "select", "slice"),
    *("split", "squeeze", "t", "transpose", "unsqueeze", "view", "_unsafe_view"),
}


class Kernels(TorchDispatchMode):
    """Counts the operations that a GPU would launch a kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.experts = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1]
        self.count += name not in _VIEWS
        self.experts += name == "index_add_"  # once an expert, forward and backward
        return function(*args, **(kwargs or {}))


def _activation(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.fixture(scope="module")
def student(micro_model: Path, tmp_path_factory: pytest.TempPathFactory, write_overlay: Any) -> LoadedModel:
    overlay = tmp_path_factory.mktemp("overlays") / "overlay"
    write_overlay(micro_model, overlay, width=WIDTH, std=0.1)
    loaded = load_student(ModelSection(path=micro_model, device="cpu"), overlay)
    assert loaded.shared_experts is not None
    for name, parameter in loaded.shared_experts.named_parameters():
        parameter.requires_grad_("scale" not in name)
    return loaded


def _pass(student: LoadedModel, forward: Any, backward: Any) -> None:
    """A student's forward pass with logits under `forward`, the backward pass under `backward`."""
    ids = torch.randint(0, 4000, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with forward:
        hidden, _ = student.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool))
        logits = hidden @ student.head.T
    with backward:
        logits.sum().backward()


def test_operations_of_a_student_are_those_that_torch_counts(student: LoadedModel, micro_model: Path) -> None:
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    _pass(student, forward, backward)
    flop, tokens = token_flop(model_sizes(micro_model), LENGTH, WIDTH), 2 * LENGTH
    assert flop.student + flop.head == pytest.approx(forward.get_total_flops() / tokens, rel=0.01)
    assert flop.backward + flop.head == pytest.approx(backward.get_total_flops() / tokens, rel=0.01)


def test_kernels_of_an_expert_of_true_shape_are_counted() -> None:
    def count(experts: int) -> tuple[int, int]:
        shape = MoeDimensions(1, experts, 1, 2880, 2880)
        module = PackedExperts(shape, _activation, packed=True, dtype=torch.bfloat16)
        for parameter in module.parameters():
            parameter.data.fill_(120) if parameter.dtype == torch.uint8 else parameter.data.zero_()
        states = torch.randn(4, 2880, dtype=torch.bfloat16, requires_grad=True)
        indices, weights = torch.arange(4)[:, None] % experts, torch.ones(4, 1, dtype=torch.bfloat16)
        with Kernels() as forward:
            output = module(states, indices, weights).sum()
        with Kernels() as backward:
            output.backward()
        return forward.count, backward.count

    count(1)  # tables that are made once
    one, two = count(1), count(2)
    assert two[0] - one[0] == figures.EXPERT_KERNELS_FORWARD
    assert two[1] - one[1] == figures.EXPERT_KERNELS_BACKWARD


def test_kernels_of_a_layer_beside_its_experts(tokenizer_directory: Path, tmp_path: Path, write_overlay: Any) -> None:
    """Of the embedded model, whose matrices are looked up in one piece, not in 4 and 8: 2 kernels a piece."""
    overlay = write_overlay(tokenizer_directory, tmp_path / "overlay", width=WIDTH, std=0.1, token_gate=True)
    student = load_student(ModelSection(path=tokenizer_directory, device="cpu", dtype="bfloat16"), overlay)
    assert student.shared_experts is not None
    for name, parameter in student.shared_experts.named_parameters():
        parameter.requires_grad_("scale" not in name)
    _pass(student, Kernels(), Kernels())
    forward, backward = Kernels(), Kernels()
    _pass(student, forward, backward)
    pieces = 2 * (4 + 8 - 2)
    layers = student.dimensions.layers
    beside = forward.count - forward.experts * (figures.EXPERT_KERNELS_FORWARD - pieces)
    assert beside / layers == pytest.approx(figures.LAYER_KERNELS_FORWARD, rel=0.2)
    beside = backward.count - backward.experts * (figures.EXPERT_KERNELS_BACKWARD - pieces)
    assert beside / layers == pytest.approx(figures.LAYER_KERNELS_BACKWARD, rel=0.2)


def test_experts_that_a_batch_meets() -> None:
    speed = GpuSpeed(
        GPUS["h100"], model_sizes(Path("gpt-oss-120b")), token_flop(model_sizes(Path("gpt-oss-120b")), 8, 8), True
    )
    assert speed.used_experts(1) == pytest.approx(4)
    assert speed.used_experts(2) == pytest.approx(4 + 4 * (1 - 4 / 128))
    assert speed.used_experts(10_000) == pytest.approx(128)


def test_a_batch_takes_as_long_as_its_slower_half() -> None:
    assert BatchTime(2.0, 3.0, 4.0).seconds == 5.0
    assert (BatchTime(2.0, 3.0, 4.0).bound, BatchTime(3.0, 2.0, 4.0).bound) == ("memory", "products")
    assert (BatchTime(2.0, 3.0, 6.0).seconds, BatchTime(2.0, 3.0, 6.0).bound) == (6.0, "launches")


def test_a_forward_pass_of_120b_by_hand() -> None:
    """One sequence of 1,024 tokens on an H100: every figure written out."""
    sizes = model_sizes(Path("gpt-oss-120b"))
    speed = GpuSpeed(GPUS["h100"], sizes, token_flop(sizes, 1024, 2880), packed=True)
    time = speed.forward(1024, head=1024)
    experts = 36 * 128 * (1 - (124 / 128) ** 1024)
    attention = 2 * 2880 * (4096 + 2 * 512) + 2 * 4096 * 2880 + 4 * 4096 * 1024
    moe = 2 * 2880 * 128 + 2 * 4 * 3 * 2880 * 2880
    assert time.products == pytest.approx(1024 * (36 * (attention + moe) + 2 * 2880 * 201_088) / (0.25 * 989e12))
    assert time.memory == pytest.approx(experts * 3 * 2880 * 2880 * 10.5 / 3.35e12)
    assert time.launches == pytest.approx((36 * 85 + experts * 46) * 5e-6)
    assert time.bound == "launches"


def test_workers_that_share_a_gpu_share_its_speed() -> None:
    sizes = model_sizes(Path("gpt-oss-20b"))
    whole = GpuSpeed(GPUS["h100"], sizes, token_flop(sizes, 1024, 2880), packed=True)
    half = dataclasses.replace(whole, share=0.5)
    assert half.forward(65_536, head=0).products == pytest.approx(2 * whole.forward(65_536, head=0).products)


def test_checkpointed_layers_run_again_without_their_packed_experts() -> None:
    sizes = model_sizes(Path("gpt-oss-20b"))
    flop = token_flop(sizes, 1024, 2880)
    plain = GpuSpeed(GPUS["h100"], sizes, flop, packed=True)
    again = dataclasses.replace(plain, checkpointed=True)
    more = (again.backward(1, head=0).products - plain.backward(1, head=0).products) * 0.25 * 989e12
    assert more == pytest.approx(flop.student - 2 * 24 * 4 * 3 * 2880 * 2880)
