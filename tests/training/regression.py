"""A small task for the loop, and what tests of the loop share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nexus_ray.config import OptimiserSection, RoutersSection
from nexus_ray.training.loop import run_steps
from nexus_ray.training.optimiser import build_optimiser
from nexus_ray.training.settings import LoopSettings
from nexus_ray.training.watching.metrics import read_metrics

STEPS = 12
ROUTERS = RoutersSection(train="bias", bias_learning_rate_factor=0.5, freeze_bias_at=0.5)


class Regression:
    """Least squares whose data are a function of the step; stops like a killed process where it is told to."""

    def __init__(self, optimiser: OptimiserSection, stop_before: int | None = None) -> None:
        torch.manual_seed(0)
        self.parameters = {
            "layer.weight": nn.Parameter(torch.randn(3, 4)),
            "layer.bias": nn.Parameter(torch.zeros(3)),
            "routers.0.bias": nn.Parameter(torch.zeros(3)),
        }
        self.initial = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimiser = build_optimiser(self.parameters, optimiser, ROUTERS)
        self.stop_before = stop_before
        self.bad: dict[int, float] = {}
        self.validations: list[float] = []
        self.taken: list[int] = []

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        inputs, labels = torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)
        layer = self.parameters
        outputs = inputs @ layer["layer.weight"].T + layer["layer.bias"] + layer["routers.0.bias"]
        return (outputs - labels).square().mean() * self.bad.get(step, 1.0)

    def accumulate(self, step: int) -> dict[str, Any]:
        if step == self.stop_before:
            raise KeyboardInterrupt
        self.taken.append(step)
        loss = self.loss(step)
        loss.backward()
        return {"loss": float(loss.detach()), "tokens": 8}

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        return {"loss": self.validations.pop(0) if self.validations else float(self.loss(1000))}

    def initial_weights(self) -> dict[str, Tensor]:
        return self.initial

    def not_finite(self, step: int) -> list[str]:
        return [f"play {step}"]

    def samples(self) -> list[dict[str, str]]:
        return [{"prompt": "To be", "text": "or not"}]


def train(settings: LoopSettings, stop_before: int | None = None, **task: Any) -> Regression:
    """Run to the end, or up to a sudden death."""
    found = Regression(settings.optimiser, stop_before)
    for name, value in task.items():
        setattr(found, name, value)
    try:
        run_steps(found, settings)
    except KeyboardInterrupt:
        assert stop_before is not None
    return found


def events(settings: LoopSettings) -> list[tuple[str, int]]:
    return [(record["event"], record["step"]) for record in read_metrics(settings.layout.metrics)]


def assert_same(found: Regression, expected: Regression) -> None:
    for name, parameter in expected.parameters.items():
        assert torch.equal(found.parameters[name], parameter), name
