"""The optimiser's groups and learning rates, and that a restored state continues bit for bit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_ray.config import OptimiserSection, RoutersSection
from nexus_ray.errors import ArtefactError, ConfigError
from nexus_ray.training.optimiser import (
    build_optimiser,
    check_optimiser,
    optimiser_tensors,
    restore_optimiser,
    set_learning_rates,
)

SHAPES = {
    "layers.0.gate_up_proj.weight": (128, 64),
    "layers.0.gate_up_proj.bias": (128,),
    "layers.0.down_proj.weight": (67, 71),  # no whole number of blocks of 256
    "layers.0.scale": (),
    "norm.weight": (64,),
    "routers.0.weight": (8, 64),
    "routers.0.bias": (8,),
}
ROUTERS = RoutersSection(train="all", freeze_bias_at=0.5)
STEPS = 8


def _low_bit() -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'nexus-ray[low-bit]'")


@pytest.fixture(params=["adamw", "adamw_8bit"])
def section(request: pytest.FixtureRequest) -> OptimiserSection:
    """Of both kinds."""
    if request.param == "adamw_8bit":
        _low_bit()
    return OptimiserSection(name=request.param, weight_decay=0.1)


def _parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def _train(
    parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, section: OptimiserSection, steps: range
) -> None:
    """Steps whose gradients are a function of the step and of the weights."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            parameter.grad = parameter.detach() + torch.randn(parameter.shape, generator=generator)
        set_learning_rates(optimiser, step, STEPS, section)
        optimiser.step()
        optimiser.zero_grad()


def _copies(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_restored_run_continues_bit_for_bit(section: OptimiserSection, at: int) -> None:
    """Before the first step, in the warm-up and after the biases are frozen."""
    whole = _parameters()
    optimiser = build_optimiser(whole, section, ROUTERS)
    _train(whole, optimiser, section, range(at))
    weights, state = _copies(whole), _copies(optimiser_tensors(optimiser, whole))
    _train(whole, optimiser, section, range(at, STEPS))

    resumed = _parameters(seed=1)
    optimiser = build_optimiser(resumed, section, ROUTERS)
    _train(resumed, optimiser, section, range(2))  # what is there is replaced
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.copy_(weights[name])
    restore_optimiser(optimiser, resumed, {"parameter.norm.weight": torch.zeros(64)} | state)
    _train(resumed, optimiser, section, range(at, STEPS))
    assert all(torch.equal(whole[name], resumed[name]) for name in SHAPES)


def test_a_state_lives_on_its_own(section: OptimiserSection) -> None:
    """Steps after a restoration leave the tensors that it was restored from alone."""
    parameters = _parameters()
    optimiser = build_optimiser(parameters, section, ROUTERS)
    _train(parameters, optimiser, section, range(2))
    state = _copies(optimiser_tensors(optimiser, parameters))
    before = _copies(state)
    restore_optimiser(optimiser, parameters, state)
    _train(parameters, optimiser, section, range(2, 4))
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_a_state_that_lacks_a_moment_is_refused_and_nothing_changes(section: OptimiserSection) -> None:
    parameters = _parameters()
    optimiser = build_optimiser(parameters, section, ROUTERS)
    _train(parameters, optimiser, section, range(2))
    state = _copies(optimiser_tensors(optimiser, parameters))
    fresh = build_optimiser(parameters, section, ROUTERS)
    for missing in state:
        with pytest.raises(ArtefactError, match=missing):
            restore_optimiser(fresh, parameters, {name: value for name, value in state.items() if name != missing})
    assert not fresh.state


def test_a_state_of_other_shapes_is_refused(section: OptimiserSection) -> None:
    parameters = _parameters()
    optimiser = build_optimiser(parameters, section, ROUTERS)
    state = _copies(optimiser_tensors(optimiser, parameters))
    wrong = next(name for name in state if name.endswith("norm.weight") and state[name].ndim)
    state[wrong] = state[wrong][:-1]
    with pytest.raises(ArtefactError, match=r"\[63\].*\[64\]"):
        restore_optimiser(optimiser, parameters, state)


def test_the_state_of_another_kind_of_optimiser_is_refused() -> None:
    _low_bit()
    parameters = _parameters()
    kinds = [OptimiserSection(name=name) for name in ("adamw", "adamw_8bit")]
    for before, after in (kinds, kinds[::-1]):
        state = optimiser_tensors(build_optimiser(parameters, before, ROUTERS), parameters)
        with pytest.raises(ArtefactError, match="its optimiser is not the one of this run"):
            restore_optimiser(build_optimiser(parameters, after, ROUTERS), parameters, state)


def test_weight_decay_leaves_biases_norms_and_scales_alone(section: OptimiserSection) -> None:
    """With gradients of zero only decay moves anything: each step multiplies by 1 - learning rate * decay."""
    parameters = _parameters()
    before = _copies(parameters)
    optimiser = build_optimiser(parameters, section, ROUTERS)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    rates = set_learning_rates(optimiser, 3, STEPS, section)
    optimiser.step()
    decayed = {"layers.0.gate_up_proj.weight", "layers.0.down_proj.weight", "routers.0.weight"}
    for name, parameter in parameters.items():
        rate = rates["router_learning_rate" if name.startswith("routers") else "learning_rate"]
        kept = 1 - rate * 0.1 if name in decayed else 1
        torch.testing.assert_close(parameter.detach(), before[name] * kept, rtol=1e-6, atol=0)


def test_routers_learn_at_their_own_rates(section: OptimiserSection) -> None:
    """The first step of Adam moves every weight by the learning rate, whatever the gradient."""
    parameters = _parameters()
    before = _copies(parameters)
    plain = section.model_copy(update={"weight_decay": 0.0})
    optimiser = build_optimiser(parameters, plain, ROUTERS)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    logged = set_learning_rates(optimiser, 3, STEPS, plain)
    assert logged == {
        "learning_rate": 1e-2,
        "router_learning_rate": pytest.approx(1e-3),
        "router_bias_learning_rate": pytest.approx(1e-5),
    }
    optimiser.step()
    for name, parameter in parameters.items():
        rate = {"routers.0.weight": 1e-3, "routers.0.bias": 1e-5}.get(name, 1e-2)
        step = before[name] - parameter.detach()
        torch.testing.assert_close(step, torch.full_like(step, rate), rtol=2e-2, atol=2e-7)


def test_biases_stay_as_they_are_once_they_are_frozen(section: OptimiserSection) -> None:
    parameters = _parameters()
    optimiser = build_optimiser(parameters, section, ROUTERS)
    history = []
    for step in range(STEPS):
        _train(parameters, optimiser, section, range(step, step + 1))
        history.append(parameters["routers.0.bias"].detach().clone())
    moved = [not torch.equal(after, before) for before, after in pairwise(history)]
    assert moved == [True, True, True, False, False, False, False]
    assert set_learning_rates(optimiser, 4, STEPS, section)["router_bias_learning_rate"] == 0.0


def test_plain_training_has_one_learning_rate() -> None:
    parameters = {"layers.0.down_proj.weight": nn.Parameter(torch.ones(2, 2))}
    optimiser = build_optimiser(parameters, OptimiserSection())
    assert set_learning_rates(optimiser, 5, 10, OptimiserSection()).keys() == {"learning_rate"}


def test_eight_bit_moments_take_a_quarter_and_train_as_well() -> None:
    """Least squares with a known answer; the moments of AdamW are the reference."""
    _low_bit()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 128, generator=generator)
    answer = torch.randn(128, 64, generator=generator)
    losses, sizes = [], []
    for name in ("adamw", "adamw_8bit"):
        section = OptimiserSection.model_validate({"name": name, "learning_rate": 0.05})
        parameters = {"weight": nn.Parameter(torch.zeros(128, 64))}
        optimiser = build_optimiser(parameters, section)
        for step in range(150):
            set_learning_rates(optimiser, step, 150, section)
            loss = (inputs @ parameters["weight"] - inputs @ answer).square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        losses.append(loss.item())
        moments = {key: value for key, value in optimiser.state[parameters["weight"]].items() if "qmap" not in key}
        sizes.append(sum(value.nbytes for value in moments.values() if isinstance(value, Tensor)))
    assert losses[0] < 0.1
    assert losses[1] < 1.2 * losses[0] + 1e-3
    assert sizes[1] < 0.27 * sizes[0]


def test_a_missing_package_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus_ray.training.optimiser.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="bitsandbytes is not installed") as caught:
        check_optimiser(OptimiserSection(name="adamw_8bit"))
    assert caught.value.hint is not None
    assert "pip install 'nexus-ray[low-bit]'" in caught.value.hint
    check_optimiser(OptimiserSection())
