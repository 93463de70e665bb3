"""Overlays on disk: stored type, shards, and every way in which one can contradict its description."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints.files import FullDisk
from safetensors.torch import load_file, save_file
from torch import Tensor

from nexus_ray.checkpoints.overlay import (
    OverlayConfig,
    OverlayWriter,
    load_overlay,
    load_overlay_config,
    overlay_specs,
    save_overlay,
)
from nexus_ray.errors import ArtefactError, StorageError
from nexus_ray.modeling.loading import build_shared_experts

BASE = "b" * 64
CONFIG = OverlayConfig(
    base_fingerprint=BASE,
    model_type="gpt_oss",
    layers=3,
    hidden_size=8,
    width=6,
    token_gate=True,
    scale=0.5,
    learn_scale=True,
    initialisation="random",
)


def _tensors(config: OverlayConfig = CONFIG) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {spec.name: torch.randn(spec.shape, generator=generator) for spec in overlay_specs(config)}


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    save_overlay(tmp_path / "overlay", CONFIG, _tensors())
    return tmp_path / "overlay"


@pytest.mark.parametrize("token_gate", [False, True])
def test_the_tensors_are_those_of_the_modules(token_gate: bool) -> None:
    config = CONFIG.model_copy(update={"token_gate": token_gate})
    modules = build_shared_experts(config, lambda gate, up: gate * up).state_dict()
    assert {spec.name: spec.shape for spec in overlay_specs(config)} == {
        name: tuple(tensor.shape) for name, tensor in modules.items()
    }
    assert sum(spec.nbytes // spec.dtype.itemsize for spec in overlay_specs(config)) == config.parameters


def test_tensors_are_rounded_to_bfloat16_but_for_the_scales(overlay: Path) -> None:
    stored = load_file(overlay / "overlay.safetensors")
    loaded_config, loaded = load_overlay(overlay, BASE)
    assert loaded_config == CONFIG
    assert set(stored) == set(loaded) == set(_tensors())
    for name, tensor in _tensors().items():
        expected = tensor if name.endswith("scale") else tensor.bfloat16()
        assert stored[name].dtype == loaded[name].dtype == expected.dtype
        assert stored[name].equal(expected)
        assert loaded[name].equal(expected)


def test_float32_overlays_are_exact(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"dtype": "float32"})
    save_overlay(tmp_path / "overlay", config, _tensors())
    loaded = load_overlay(tmp_path / "overlay", BASE)[1]
    assert all(loaded[name].equal(tensor) for name, tensor in _tensors().items())


def test_an_overlay_larger_than_a_shard(tmp_path: Path) -> None:
    with OverlayWriter(tmp_path / "overlay", CONFIG, shard_bytes=400) as writer:
        for name, tensor in reversed(_tensors().items()):
            writer.write(name, tensor)
    names = sorted(path.name for path in (tmp_path / "overlay").iterdir())
    assert names[:2] == ["overlay-00001-of-00003.safetensors", "overlay-00002-of-00003.safetensors"]
    assert names[3:] == ["overlay.safetensors.index.json", "overlay_config.json"]
    loaded = load_overlay(tmp_path / "overlay", BASE)[1]
    assert all(loaded[name].float().equal(tensor.bfloat16().float()) for name, tensor in _bodies().items())


def _bodies() -> dict[str, Tensor]:
    return {name: tensor for name, tensor in _tensors().items() if not name.endswith("scale")}


def test_saving_again_replaces_shards_by_one_file(tmp_path: Path, overlay: Path) -> None:
    with OverlayWriter(overlay, CONFIG, shard_bytes=400) as writer:
        for name, tensor in _tensors().items():
            writer.write(name, tensor)
    save_overlay(overlay, CONFIG, _tensors())
    assert sorted(path.name for path in overlay.iterdir()) == ["overlay.safetensors", "overlay_config.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3.4e38])
def test_values_that_are_not_finite_are_not_written(overlay: Path, value: float) -> None:
    """3.4e38 is finite in float32 and infinite in bfloat16."""
    before = (overlay / "overlay.safetensors").read_bytes()
    tensors = _tensors()
    tensors["layers.1.down_proj.weight"][3, 2] = value
    with pytest.raises(ArtefactError, match=r"layers\.1\.down_proj\.weight of the overlay has values that are not f"):
        save_overlay(overlay, CONFIG, tensors)
    assert (overlay / "overlay.safetensors").read_bytes() == before
    assert [path.name for path in overlay.parent.iterdir()] == ["overlay"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_is_found_wherever_it_is(tmp_path: Path, value: float) -> None:
    config = CONFIG.model_copy(update={"width": 75})  # an odd length, so that vectorised loops have a rest
    with OverlayWriter(tmp_path / "overlay", config) as writer:
        for name, tensor in _tensors(config).items():
            writer.write(name, tensor)
        for place in range(150):
            bias = torch.zeros(150)
            bias[place] = value
            with pytest.raises(ArtefactError, match="not finite"):
                writer.write("layers.0.gate_up_proj.bias", bias)


def test_an_unfinished_overlay_is_not_there(tmp_path: Path) -> None:
    def write() -> None:
        with OverlayWriter(tmp_path / "overlay", CONFIG) as writer:
            writer.write("layers.0.scale", torch.tensor(1.0))

    with pytest.raises(ValueError, match="20 tensors are not written whole"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_overlay(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in overlay.iterdir()}
    monkeypatch.setattr(os, "pwrite", FullDisk(2000))
    with pytest.raises(StorageError, match="the disk is full"):
        save_overlay(overlay, CONFIG, {name: tensor * 2 for name, tensor in _tensors().items()})
    assert {path.name: path.read_bytes() for path in overlay.iterdir()} == before
    assert [path.name for path in overlay.parent.iterdir()] == ["overlay"]


NAME = "layers.2.gate_up_proj.weight"


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors[NAME]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["layers.3.scale"] = torch.tensor(1.0)


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors[NAME] = tensors[NAME].T.contiguous()


def _retype(tensors: dict[str, Tensor]) -> None:
    tensors[NAME] = tensors[NAME].float()


def _spoil(value: float) -> Callable[[dict[str, Tensor]], None]:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[NAME][0, 0] = value

    return spoil


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"lacks layers\.2\.gate_up_proj\.weight, which its description promises"),
        (_add, r"has layers\.3\.scale, which its description does not have"),
        (_reshape, r"gate_up_proj\.weight of the overlay .* is .*16 \[8, 12\], its description says .*16 \[12, 8\]"),
        (_retype, r"gate_up_proj\.weight of the overlay .* is torch\.float32 .* says torch\.bfloat16"),
        (_spoil(float("nan")), r"layers\.2\.gate_up_proj\.weight of the overlay .* not finite"),
        (_spoil(float("-inf")), r"layers\.2\.gate_up_proj\.weight of the overlay .* not finite"),
    ],
    ids=["missing", "extra", "shape", "dtype", "NaN", "infinite"],
)
def test_tensors_that_contradict_the_description(
    overlay: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = load_file(overlay / "overlay.safetensors")
    change(tensors)
    save_file(tensors, overlay / "overlay.safetensors")
    with pytest.raises(ArtefactError, match=message):
        load_overlay(overlay, BASE)


def test_a_missing_shard_is_named(overlay: Path) -> None:
    with OverlayWriter(overlay, CONFIG, shard_bytes=400) as writer:
        for name, tensor in _tensors().items():
            writer.write(name, tensor)
    (overlay / "overlay-00002-of-00003.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"overlay-00002-of-00003\.safetensors is missing"):
        load_overlay(overlay, BASE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "has overlay format 1, not 2"),
        ({"format_version": 3, "something_new": 1}, "has overlay format 3, not 2"),
        ({"layers": 10**12}, "layers"),
        ({"layers": -1}, "layers"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"width": 10**30}, "width"),
        ({"dtype": "float16"}, "dtype"),
        ({"scale": float("nan")}, "scale"),
        ({"more": 1}, "more"),
    ],
    ids=lambda value: next(iter(value.items()), None) if isinstance(value, dict) else "",
)
def test_descriptions_that_are_refused(overlay: Path, change: dict[str, object], message: str) -> None:
    values = json.loads((overlay / "overlay_config.json").read_text())
    (overlay / "overlay_config.json").write_text(json.dumps(values | change))
    with pytest.raises(ArtefactError, match=message):
        load_overlay_config(overlay)
    with pytest.raises(ArtefactError, match=message):
        load_overlay(overlay, BASE)


def test_another_base_is_refused(overlay: Path) -> None:
    with pytest.raises(ArtefactError, match=r"was made for the base bbbbbbbbbbbb, but model\.path is cccccccccccc"):
        load_overlay(overlay, "c" * 64)
