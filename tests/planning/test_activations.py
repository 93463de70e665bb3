"""What autograd keeps in a forward pass of the student, counted storage by storage, against the formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nexus_ray.config import ModelSection
from nexus_ray.modeling.loading import activation, load_base, load_student
from nexus_ray.modeling.shared_expert import SharedExperts, SharedExpertShape
from nexus_ray.planning.activations import Workload, attention_scores, saved_for_backward
from nexus_ray.planning.sizes import read_sizes


@pytest.mark.parametrize("experts", ["packed", "grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sequences", "length"), [(2, 64), (1, 200)])
def test_saved_activations(
    micro_model: Path,
    micro_overlay: Path,
    saved_bytes: Callable[..., int],
    experts: str,
    dtype: torch.dtype,
    sequences: int,
    length: int,
) -> None:
    kind = str(dtype).removeprefix("torch.")
    section = ModelSection.model_validate({"path": micro_model, "experts": experts, "dtype": kind, "device": "cpu"})
    student = load_student(section, micro_overlay)
    assert student.shared_experts is not None
    for name, parameter in student.shared_experts.named_parameters():
        parameter.requires_grad_(not name.endswith("scale"))
    ids = torch.randint(0, 4000, (sequences, length))

    def forward() -> tuple[Tensor, ...]:
        return student.forward(ids, torch.ones_like(ids, dtype=torch.bool))

    work = Workload(sequences, length, dtype.itemsize, experts, width=64, token_gate=True, learn_scale=False)
    planned = saved_for_backward(read_sizes(micro_model), work)
    assert planned == pytest.approx(saved_bytes(forward, student.model), rel=0.07)


@pytest.mark.parametrize("experts", ["packed", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sequences", "length"), [(2, 64), (1, 200)])
def test_kept_by_checkpointed_layers(
    micro_model: Path,
    micro_overlay: Path,
    left_allocated: Callable[..., int],
    experts: str,
    dtype: torch.dtype,
    sequences: int,
    length: int,
) -> None:
    """Counted by PyTorch's allocator: masks and the order of tokens are kept without being saved tensors."""
    kind = str(dtype).removeprefix("torch.")
    section = ModelSection.model_validate({"path": micro_model, "experts": experts, "dtype": kind, "device": "cpu"})
    student = load_student(section, micro_overlay)
    assert student.shared_experts is not None
    student.shared_experts.requires_grad_(True)
    student.checkpoint_layers()
    ids = torch.randint(0, 4000, (sequences, length))

    def forward() -> tuple[Tensor, Tensor]:
        return student.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool))

    sizes = read_sizes(micro_model)
    work = Workload(sequences, length, dtype.itemsize, experts, 64, True, True, checkpointed=True)
    outputs = work.tokens * sizes.dimensions.hidden_size * dtype.itemsize
    found = left_allocated(forward)
    assert saved_for_backward(sizes, work) + outputs == pytest.approx(found, rel=0.07)
    assert found < saved_for_backward(sizes, replace(work, checkpointed=False)) / 2


def test_attention_scores_grow_with_the_square_of_the_length(micro_model: Path) -> None:
    sizes = read_sizes(micro_model)
    work = [Workload(3, length, 2, "packed", 64, token_gate=False, learn_scale=False) for length in (100, 200)]
    assert [attention_scores(sizes, each) for each in work] == [3 * 2 * n * (n + 1) * 2 for n in (100, 200)]


@pytest.mark.parametrize(("token_gate", "learn_scale"), [(False, False), (False, True), (True, True)])
def test_saved_by_gate_and_scale(
    micro_model: Path, saved_bytes: Callable[..., int], token_gate: bool, learn_scale: bool
) -> None:
    student = load_base(ModelSection(path=micro_model, device="cpu"))
    shape = SharedExpertShape(hidden_size=64, width=96, token_gate=token_gate)
    experts = SharedExperts(2, shape, activation(student.family, student.config))
    experts.attach(student.family.moe_blocks(student.model))
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(learn_scale or not name.endswith("scale"))
    ids = torch.randint(0, 4000, (2, 64))

    def forward() -> tuple[Tensor, ...]:
        return student.forward(ids, torch.ones_like(ids, dtype=torch.bool))

    work = Workload(2, 64, 4, "packed", width=96, token_gate=token_gate, learn_scale=learn_scale)
    planned = saved_for_backward(read_sizes(micro_model), work)
    assert planned == pytest.approx(saved_bytes(forward, nn.ModuleList([student.model, experts])), rel=0.05)
