"""What AdamW keeps and needs at work, against the optimiser itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nexus_ray.config import OptimiserSection
from nexus_ray.planning.optimiser import moment_bytes, update_bytes
from nexus_ray.training.optimiser import build_optimiser

SHAPES = [(256, 300), (300,), (64, 64), (4095,), (71, 67), (1,)]


@pytest.fixture(params=["adamw", "adamw_8bit"])
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="pip install 'nexus-ray[low-bit]'")
    return str(request.param)


def _optimiser(name: str) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimiser = build_optimiser(
        {str(index): parameter for index, parameter in enumerate(parameters)},
        OptimiserSection.model_validate({"name": name}),
    )
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimiser.step()
    return optimiser, parameters


def test_moments_are_counted_exactly(name: str) -> None:
    """The step number and the map of 8-bit values, the same for all tensors, aside."""
    optimiser, parameters = _optimiser(name)
    for parameter in parameters:
        state = {key: value for key, value in optimiser.state[parameter].items() if "qmap" not in key and key != "step"}
        assert all(isinstance(value, Tensor) for value in state.values())
        assert moment_bytes(parameter.numel(), name) == sum(value.nbytes for value in state.values())


def test_the_update_on_a_cpu_takes_what_is_planned(name: str, most_allocated: Callable[..., int]) -> None:
    optimiser, parameters = _optimiser(name)
    largest, trained = max(p.numel() for p in parameters), sum(p.numel() for p in parameters)
    planned = update_bytes(trained, largest, name, "cpu")
    assert planned == pytest.approx(most_allocated(optimiser.step), rel=0.02)
