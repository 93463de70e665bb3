"""Every tensor of the shared experts comes, once, and none besides; without vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nexus_ray.errors import ArtefactError
from nexus_ray.vllm_plugin.shared_tensors import SharedTensors, described

Checkpoint = list[tuple[str, Tensor]]
NAME = "model.layers.0.shared_expert.down_proj.weight"


@pytest.fixture
def config(packed_export: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((packed_export / "config.json").read_text())
    return loaded


@pytest.fixture
def checkpoint(packed_export: Path) -> Checkpoint:
    """Every tensor of every file."""
    files = sorted(packed_export.glob("*.safetensors"))
    return [item for file in files for item in load_file(file).items()]


def _parameters(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.full_like(tensor, torch.nan, dtype=dtype))
        for name, tensor in checkpoint
        if "shared_expert" in name
    }


@pytest.mark.parametrize("backwards", [False, True])
def test_shared_tensors_fill_their_parameters_and_all_others_pass_unchanged(
    checkpoint: Checkpoint, config: dict[str, Any], backwards: bool
) -> None:
    stream = checkpoint[::-1] if backwards else checkpoint
    parameters = _parameters(checkpoint)
    shared = SharedTensors(described(config), parameters)
    rest = list(shared.taken_from(iter(stream)))
    shared.require_complete()
    assert [name for name, _ in rest] == [name for name, _ in stream if "shared_expert" not in name]
    assert len(parameters) == 14
    for name, tensor in checkpoint:
        if name in parameters:
            assert torch.equal(parameters[name].data, tensor.float())


def test_parameters_keep_their_own_type(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    parameters = _parameters(checkpoint, torch.bfloat16)
    list(SharedTensors(described(config), parameters).taken_from(checkpoint))
    assert torch.equal(parameters[NAME].data, dict(checkpoint)[NAME].bfloat16())


def test_a_pipeline_stage_takes_its_own_layers_and_checks_all(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    own = {name: value for name, value in _parameters(checkpoint).items() if ".layers.1." in name}
    shared = SharedTensors(described(config), own)
    list(shared.taken_from(checkpoint))
    shared.require_complete()
    assert all(torch.isfinite(parameter).all() for parameter in own.values())


def test_missing_tensors_are_named(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    for missing in _parameters(checkpoint):
        shared = SharedTensors(described(config), _parameters(checkpoint))
        list(shared.taken_from((name, tensor) for name, tensor in checkpoint if name != missing))
        with pytest.raises(ArtefactError, match=f"lacks 1 of 14 tensors of its shared experts: {missing}\n"):
            shared.require_complete()


def test_many_missing_tensors_are_counted(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    with pytest.raises(ArtefactError, match=r"lacks 14 of 14 .*down_proj\.bias, .* and 10 more"):
        SharedTensors(described(config), _parameters(checkpoint)).require_complete()


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (("model.layers.2.shared_expert.scale", torch.ones(())), "layers.2.shared_expert.scale belongs to no shared"),
        (("model.layers.0.shared_expert.up_proj.weight", torch.ones(2)), "up_proj.weight belongs to no shared expert"),
        (("model.layers.0.mlp.shared_expert.scale", torch.ones(())), "mlp.shared_expert.scale belongs to no shared"),
        ((NAME, torch.ones(64, 64)), "down_proj.weight is in the export twice"),
    ],
)
def test_surplus_tensors_are_refused_by_name(
    checkpoint: Checkpoint, config: dict[str, Any], added: tuple[str, Tensor], message: str
) -> None:
    shared = SharedTensors(described(config), _parameters(checkpoint))
    with pytest.raises(ArtefactError, match=message):
        list(shared.taken_from([*checkpoint, added]))


def test_a_tensor_of_another_shape_is_refused_even_if_it_could_be_broadcast(
    checkpoint: Checkpoint, config: dict[str, Any]
) -> None:
    stream = [(name, torch.ones(64, 1) if name == NAME else tensor) for name, tensor in checkpoint]
    with pytest.raises(ArtefactError, match=r"down_proj.weight is \[64, 1\], config.json says \[64, 64\]"):
        list(SharedTensors(described(config), _parameters(checkpoint)).taken_from(stream))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_experts": None}, "shared_experts is missing"),
        ({"shared_experts": {"width": 64}}, "shared_experts is not what export writes"),
        ({"num_hidden_layers": 3}, "shared_experts is for 2 layers, the model has 3"),
    ],
)
def test_a_configuration_that_does_not_describe_the_shared_experts_is_refused(
    config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtefactError, match=message):
        described(config | change)
