"""Sizes from headers against the model that transformers builds, and the files as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from nexus_ray.checkpoints.overlay import STEM
from nexus_ray.config import Config, ModelSection
from nexus_ray.errors import ModelError
from nexus_ray.modeling.loading import LoadedModel, load_base, load_student
from nexus_ray.planning.sizes import ModelSizes, read_sizes
from nexus_ray.planning.weights import base_weights, overlay_size


@pytest.fixture
def sizes(micro_model: Path) -> ModelSizes:
    return read_sizes(micro_model)


def test_parameters_are_those_of_the_stock_model(micro_model: Path, sizes: ModelSizes) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(micro_model))
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_stored_bytes_are_those_of_the_file(micro_model: Path, sizes: ModelSizes) -> None:
    file = micro_model / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert sizes.stored_bytes == file.stat().st_size - header
    with safe_open(file, "pt") as tensors:
        assert sizes.largest_tensor_bytes == max(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118


@pytest.mark.parametrize("experts", ["packed", "grouped_mm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_in_memory_are_those_of_the_loaded_model(
    micro_model: Path, sizes: ModelSizes, experts: str, dtype: str
) -> None:
    loaded = load_base(ModelSection(path=micro_model, experts=experts, dtype=dtype, device="cpu"))
    kind = getattr(torch, dtype)
    planned = base_weights(sizes, packed=experts == "packed", dtype=kind, device="cpu")
    total = sum(parameter.nbytes for parameter in loaded.model.parameters())
    assert planned.own + planned.mapped == total
    assert planned.mapped == _mapped_bytes(loaded, micro_model)
    on_gpu = base_weights(sizes, packed=experts == "packed", dtype=kind, device="cuda")
    assert (on_gpu.own, on_gpu.mapped) == (total, 0)


def _mapped_bytes(loaded: LoadedModel, base: Path) -> int:
    """Bytes of parameters whose memory lies in a mapping of the base's file."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(base / "model.safetensors")):
            ranges.append([int(end, 16) for end in line.split()[0].split("-")])
    inside = [p for p in loaded.model.parameters() if any(low <= p.data_ptr() < high for low, high in ranges)]
    return sum(p.nbytes for p in inside)


def test_overlay_counts_are_those_of_the_loaded_overlay(
    micro_model: Path, micro_overlay: Path, micro_config: Callable[..., Config], sizes: ModelSizes, tmp_path: Path
) -> None:
    config = micro_config(tmp_path, **{"convert.token_gate": True, "convert.dtype": "float32"})
    planned = overlay_size(sizes, config)
    shared = load_student(ModelSection(path=micro_model), micro_overlay).shared_experts
    assert shared is not None
    counts = {name: tensor.numel() for name, tensor in shared.state_dict().items()}
    assert planned.parameters == sum(counts.values())
    assert planned.trained == sum(count for name, count in counts.items() if not name.endswith("scale"))
    assert planned.largest == max(counts.values())
    assert planned.moments == 2 * 4 * planned.trained
    file = micro_overlay / f"{STEM}.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert planned.stored_bytes == file.stat().st_size - header


@pytest.mark.parametrize("field", ["num_attention_heads", "num_hidden_layers", "hidden_size"])
def test_a_configuration_without_a_field_is_refused(micro_model: Path, tmp_path: Path, field: str) -> None:
    shutil.copytree(micro_model, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    values = json.loads(path.read_text())
    del values[field]
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=rf"config\.json.*{field}"):
        read_sizes(tmp_path / "copy")
