"""The trained router is chosen whatever the order of the files, and MXFP4 unpacks to what transformers has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GptOssForCausalLM

from nexus_ray.errors import ArtefactError
from nexus_ray.families import FAMILIES
from nexus_ray.huggingface.export import export
from nexus_ray.vllm_plugin.base_tensors import dequantised, settled_routers

Checkpoint = list[tuple[str, Tensor]]
FAMILY = FAMILIES["gpt_oss"]
ADDED = "model-shared-experts.safetensors"


def _config(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return loaded


def _checkpoint(directory: Path) -> Checkpoint:
    """Every tensor of every file, so that a trained router comes twice."""
    return [item for file in sorted(directory.glob("*.safetensors")) for item in load_file(file).items()]


@pytest.fixture(params=["bias", "all"])
def routed(request: pytest.FixtureRequest, plain_base: Path, overlay_for: Callable[..., Path], tmp_path: Path) -> Path:
    """An export with trained routers."""
    return export(plain_base, overlay_for(plain_base, request.param), tmp_path / "routed").directory


@pytest.mark.parametrize("backwards", [False, True])
def test_the_trained_router_is_chosen_in_either_order(routed: Path, backwards: bool) -> None:
    stream = _checkpoint(routed)
    stream = stream[::-1] if backwards else stream
    settled = list(settled_routers(stream, _config(routed), FAMILY))
    added = load_file(routed / ADDED)
    expected = {name: tensor for name, tensor in stream if "router" not in name} | {
        name: added.get(name, tensor) for name, tensor in _checkpoint(routed) if ".mlp.router." in name
    }
    assert len(settled) == len(expected)  # one of a name, and no base_router
    assert {name for name, _ in settled} == set(expected)
    for name, tensor in settled:
        assert torch.equal(tensor, expected[name]), name


def test_without_the_added_file_the_bases_router_is_not_taken_for_the_trained_one(routed: Path) -> None:
    stream = [
        (name, tensor)
        for file in sorted(routed.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if file.name != ADDED or "base_router" in name
    ]
    with pytest.raises(ArtefactError, match=r"the routers .* are not those that were exported"):
        list(settled_routers(stream, _config(routed), FAMILY))


@pytest.mark.parametrize("missing", ["model.layers.1.base_router.bias", "model.layers.1.mlp.router.bias"])
def test_missing_router_tensors_are_named(routed: Path, missing: str) -> None:
    stream = [(name, tensor) for name, tensor in _checkpoint(routed) if name != missing]
    with pytest.raises(ArtefactError, match=f"lacks 1 tensors of its routers: {missing}"):
        list(settled_routers(stream, _config(routed), FAMILY))


def test_a_bases_router_beside_untrained_ones_is_refused(packed_export: Path) -> None:
    surplus = ("model.layers.0.base_router.bias", torch.zeros(8))
    with pytest.raises(ArtefactError, match=r"base_router\.bias is there, but config.json describes no trained"):
        list(settled_routers([*_checkpoint(packed_export), surplus], _config(packed_export), FAMILY))


def test_untrained_routers_pass_in_their_places(packed_export: Path) -> None:
    stream = _checkpoint(packed_export)
    passed = list(settled_routers(stream, _config(packed_export), FAMILY))
    assert [name for name, _ in passed] == [name for name, _ in stream]


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_unpacks_to_the_matrices_that_transformers_makes_of_it(
    micro_model: Path, dtype: torch.dtype, backwards: bool
) -> None:
    stream = _checkpoint(micro_model)
    unpacked = dict(dequantised(stream[::-1] if backwards else stream, dtype))
    expected = GptOssForCausalLM.from_pretrained(micro_model, dtype=torch.bfloat16).state_dict()
    assert set(unpacked) == set(expected)
    experts = [name for name in expected if name.endswith("_proj") and ".experts." in name]
    assert len(experts) == 4
    for name in experts:
        assert unpacked[name].dtype == dtype
        assert torch.equal(unpacked[name], expected[name].to(dtype)), name


def test_half_a_matrix_is_refused_by_name(micro_model: Path) -> None:
    stream = [item for item in _checkpoint(micro_model) if item[0] != "model.layers.1.mlp.experts.down_proj_scales"]
    with pytest.raises(ArtefactError, match=r"lacks the other half .* of model\.layers\.1\.mlp\.experts\.down_proj_b"):
        list(dequantised(stream, torch.float32))
