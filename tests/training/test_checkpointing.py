"""A checkpoint continues training bit for bit, holds no pickle, and a damaged one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from nexus_ray.config import OptimiserSection
from nexus_ray.errors import ArtefactError
from nexus_ray.training.checkpointing import load_checkpoint, take_snapshot, write_snapshot
from nexus_ray.training.optimiser import build_optimiser


def new_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.3), nn.GELU(), nn.Linear(12, 3))


def new_optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimiser(parameters(model), OptimiserSection(learning_rate=1e-2, weight_decay=0.1))


def save_checkpoint(directory: Path, model: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    write_snapshot(directory, take_snapshot(parameters(model), state, optimiser))


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: range) -> list[float]:
    """Steps whose loss depends on weights, moments, step count and (through dropout) the random state."""
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs, labels = torch.randn(16, 6, generator=generator), torch.randn(16, 3, generator=generator)
        loss = nn.functional.mse_loss(model(inputs), labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = new_model()
    optimiser = new_optimiser(model)
    train(model, optimiser, range(5))
    save_checkpoint(tmp_path / "checkpoint", model, optimiser, {"step": 5, "best": 1.5})
    return tmp_path / "checkpoint"


def test_training_continues_bit_for_bit(tmp_path):
    model = new_model()
    optimiser = new_optimiser(model)
    train(model, optimiser, range(5))
    save_checkpoint(tmp_path / "checkpoint", model, optimiser, {"step": 5})
    expected = train(model, optimiser, range(5, 12))

    resumed = new_model(seed=1)
    resumed_optimiser = new_optimiser(resumed)
    torch.manual_seed(123)
    state = load_checkpoint(tmp_path / "checkpoint", parameters(resumed), resumed_optimiser)
    assert state == {"step": 5}
    assert train(resumed, resumed_optimiser, range(5, 12)) == expected
    for name, parameter in parameters(resumed).items():
        assert torch.equal(parameter, parameters(model)[name])


def test_the_moments_matter(saved):
    """The test above can fail: without the optimiser's state the losses are others."""
    losses = []
    for with_optimiser in (True, False):
        model = new_model(seed=1)
        optimiser = new_optimiser(model)
        load_checkpoint(saved, parameters(model), optimiser if with_optimiser else None)
        losses.append(train(model, optimiser, range(5, 8)))
    assert losses[0][0] == losses[1][0]
    assert losses[0][1:] != losses[1][1:]


def test_a_checkpoint_before_the_first_step(tmp_path):
    model = new_model()
    save_checkpoint(tmp_path / "c", model, new_optimiser(model), {"step": 0})
    resumed = new_model(seed=1)
    optimiser = new_optimiser(resumed)
    load_checkpoint(tmp_path / "c", parameters(resumed), optimiser)
    assert torch.equal(resumed[0].weight, model[0].weight)
    after = train(resumed, optimiser, range(3))
    load_checkpoint(tmp_path / "c", parameters(model))
    assert after == train(model, new_optimiser(model), range(3))
    assert torch.equal(resumed[0].weight, model[0].weight)


def test_bfloat16_parameters_keep_their_bits(tmp_path):
    model = new_model().bfloat16()
    save_checkpoint(tmp_path / "c", model, new_optimiser(model), {"step": 0})
    resumed = new_model(seed=1).bfloat16()
    load_checkpoint(tmp_path / "c", parameters(resumed))
    assert torch.equal(resumed[3].weight, model[3].weight)


def test_only_the_named_parameters_are_saved(saved):
    with safe_open(saved / "state.safetensors", "pt") as file:
        names = set(file.keys())
    moments = {
        f"optimiser.{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in parameters(new_model())
    }
    assert names == {"rng.cpu"} | {f"parameter.{name}" for name in parameters(new_model())} | moments


def test_nothing_is_pickled(saved):
    assert {path.name for path in saved.iterdir()} == {"state.safetensors", "state.json"}
    json.loads((saved / "state.json").read_text())
    content = (saved / "state.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert all(entry.keys() == {"dtype", "shape", "data_offsets"} for entry in header.values())


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_a_damaged_checkpoint_is_refused(saved, name, damage):
    path = saved / name
    content = path.read_bytes()
    replacement = {"empty": b"", "cut": content[: len(content) // 2], "garbage": b"\x80\x04K\x01."}
    path.unlink()
    if damage != "missing":
        path.write_bytes(replacement[damage])
    with pytest.raises(ArtefactError, match="cannot be read"):
        load_checkpoint(saved, parameters(new_model()))


def test_a_checkpoint_of_other_parameters_is_refused(saved):
    deeper = nn.Sequential(*new_model(), nn.Linear(3, 3))
    with pytest.raises(ArtefactError, match=r"has no 4\.weight"):
        load_checkpoint(saved, parameters(deeper))


@pytest.mark.parametrize("width", [6, 24])
def test_a_checkpoint_of_other_shapes_is_refused_and_nothing_is_changed(saved, width):
    other = nn.Sequential(nn.Linear(6, width), nn.Dropout(0.3), nn.GELU(), nn.Linear(width, 3))
    before = {name: parameter.detach().clone() for name, parameter in parameters(other).items()}
    with pytest.raises(ArtefactError, match="shape"):
        load_checkpoint(saved, parameters(other))
    assert all(torch.equal(before[name], parameter) for name, parameter in parameters(other).items())


def test_a_shape_that_would_broadcast_is_refused(tmp_path):
    small, large = nn.Linear(4, 1), nn.Linear(4, 5)
    save_checkpoint(tmp_path / "c", small, new_optimiser(small), {"step": 0})
    with pytest.raises(ArtefactError, match="shape"):
        load_checkpoint(tmp_path / "c", parameters(large))


def test_a_failed_save_leaves_the_last_checkpoint(saved):
    model = new_model(seed=1)
    with pytest.raises(TypeError):
        save_checkpoint(saved, model, new_optimiser(model), {"step": object()})
    assert load_checkpoint(saved, parameters(model)) == {"step": 5, "best": 1.5}
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]
