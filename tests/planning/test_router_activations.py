"""What training the routers adds to what autograd keeps, counted storage by storage, against the formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_ray.config import ModelSection
from nexus_ray.modeling.loading import load_student
from nexus_ray.modeling.trained import trained_parameters
from nexus_ray.planning.activations import Workload, trained_routers_saved
from nexus_ray.planning.sizes import read_sizes


@pytest.mark.parametrize("experts", ["packed", "grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routers", ["bias", "all"])
def test_trained_routers_keep_what_the_formula_says(
    micro_model: Path, micro_overlay: Path, saved_bytes: Callable[..., int], experts: str, dtype: Any, routers: Any
) -> None:
    kind = str(dtype).removeprefix("torch.")
    section = ModelSection.model_validate({"path": micro_model, "experts": experts, "dtype": kind, "device": "cpu"})
    student = load_student(section, micro_overlay)
    ids = torch.randint(0, 4000, (2, 64))

    def forward() -> tuple[Tensor, ...]:
        return student.forward(ids, torch.ones_like(ids, dtype=torch.bool))

    trained_parameters(student)
    frozen = saved_bytes(forward, student.model)
    student.train_routers(routers)
    trained_parameters(student, routers)
    added = saved_bytes(forward, student.model) - frozen
    work = Workload(2, 64, dtype.itemsize, experts, 64, token_gate=True, learn_scale=False, routers=routers)
    # The base's softmax of the second layer is seen, though its graph is dropped before the layer ends; and scalars.
    dropped = work.tokens * 2 * dtype.itemsize + 64
    assert trained_routers_saved(read_sizes(micro_model), work) == pytest.approx(added, rel=0.05, abs=dropped)


def test_frozen_routers_keep_nothing(micro_model: Path) -> None:
    work = Workload(2, 64, 4, "eager", 64, token_gate=True, learn_scale=False)
    assert trained_routers_saved(read_sizes(micro_model), work) == 0
