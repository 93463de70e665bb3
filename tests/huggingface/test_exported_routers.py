"""An export with trained routers computes what the student does and, switched off, what the base does."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface.test_native_mxfp4 import go_native
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssForCausalLM

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import add_routers, load_overlay, load_overlay_config, save_overlay
from nexus_ray.config import ModelSection
from nexus_ray.errors import ArtefactError
from nexus_ray.huggingface.export import export
from nexus_ray.huggingface.merge_check import merge_check, summary
from nexus_ray.modeling.loading import load_student
from nexus_ray.storage import sha256_file

SHARD, INDEX = "model-shared-experts.safetensors", "model.safetensors.index.json"
ROUTER = "model.layers.1.mlp.router"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, micro_overlay: Path) -> Callable[..., Path]:
    """A function (kind, base) -> overlay with random differences of the routers of `base`."""

    def make(kind: Any, base: Path) -> Path:
        description, tensors = load_overlay(micro_overlay, load_overlay_config(micro_overlay).base_fingerprint)
        description, tensors = add_routers(description, tensors, kind, 8)
        generator = torch.Generator().manual_seed(5)
        for name in sorted(tensors):
            if name.startswith("routers."):
                tensors[name] = torch.randn(tensors[name].shape, generator=generator) * 0.3
        directory = tmp_path_factory.mktemp("overlays") / kind
        save_overlay(directory, description.model_copy(update={"base_fingerprint": fingerprint(base)}), tensors)
        return directory

    return make


@pytest.fixture(scope="module", params=["bias", "all"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def overlay(trained: Callable[..., Path], kind: str, micro_model: Path) -> Path:
    return trained(kind, micro_model)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory, micro_model: Path, overlay: Path) -> Path:
    """The export."""
    return export(micro_model, overlay, tmp_path_factory.mktemp("exports") / "out").directory


@torch.no_grad()
def _logits(model: Any, input_ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


def _load(directory: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", **settings)


def test_router_tensors_are_base_and_difference_in_the_bases_type(
    micro_model: Path, overlay: Path, routed: Path, kind: str
) -> None:
    base, differences = load_file(micro_model / "model.safetensors"), load_file(overlay / "overlay.safetensors")
    added = load_file(routed / SHARD)
    places = json.loads((routed / INDEX).read_text())["weight_map"]
    for layer in range(2):
        for parameter in ("weight", "bias"):
            name = f"model.layers.{layer}.mlp.router.{parameter}"
            assert torch.equal(added[f"model.layers.{layer}.base_router.{parameter}"], base[name])
            if parameter == "weight" and kind == "bias":
                assert name not in added
                assert places[name] == "model-base.safetensors"
                continue
            expected = (base[name].double() + differences[f"routers.{layer}.{parameter}"].double()).bfloat16()
            assert places[name] == SHARD
            assert added[name].dtype == torch.bfloat16
            assert torch.equal(added[name], expected)


def test_base_shards_are_as_they_were_and_the_index_counts_each_tensor_once(micro_model: Path, routed: Path) -> None:
    assert sha256_file(routed / "model-base.safetensors") == sha256_file(micro_model / "model.safetensors")
    index = json.loads((routed / INDEX).read_text())
    files = {shard: load_file(routed / shard) for shard in set(index["weight_map"].values())}
    sizes = [files[shard][name].nbytes for name, shard in index["weight_map"].items()]
    assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("memory", ["packed", "dequantised"])
def test_logits_are_the_students(
    micro_model: Path, overlay: Path, routed: Path, input_ids: Tensor, memory: str
) -> None:
    experts = "packed" if memory == "packed" else "eager"
    section = ModelSection(path=micro_model, dtype="bfloat16", experts=experts, device="cpu")
    student = load_student(section, overlay)
    student.model.set_attn_implementation("eager")
    settings = {} if memory == "packed" else {"experts_implementation": "eager"}
    model = _load(routed, dtype=torch.bfloat16, experts_memory=memory, **settings)
    assert torch.equal(_logits(model, input_ids), _logits(student.model, input_ids))


def test_switched_off_it_is_the_base_bit_for_bit_while_another_thread_has_it_on(
    micro_model: Path, routed: Path, input_ids: Tensor
) -> None:
    settings = {"dtype": torch.float32, "experts_implementation": "eager"}
    model = _load(routed, **settings)
    base = _logits(GptOssForCausalLM.from_pretrained(micro_model, attn_implementation="eager", **settings), input_ids)
    on, seen = _logits(model, input_ids), []
    with model.shared_experts_off():
        thread = threading.Thread(target=lambda: seen.extend(_logits(model, input_ids) for _ in range(3)))
        thread.start()
        off = [_logits(model, input_ids) for _ in range(3)]
        thread.join()
    assert all(torch.equal(logits, base) for logits in off)
    assert all(torch.equal(logits, on) for logits in [*seen, _logits(model, input_ids)])
    assert not torch.equal(on, base)


def test_transformers_native_blocks_route_the_same(routed: Path, input_ids: Tensor, monkeypatch: Any) -> None:
    settings = {"dtype": torch.float32, "experts_implementation": "eager"}
    model, twin = _load(routed, **settings), _load(routed, **settings)
    go_native(model, monkeypatch)
    assert torch.equal(_logits(model, input_ids), _logits(twin, input_ids))
    with model.shared_experts_off():
        assert torch.equal(_logits(model, input_ids), _logits(twin, input_ids))


def test_a_saved_model_keeps_both_routers(routed: Path, input_ids: Tensor, tmp_path: Path) -> None:
    model = _load(routed, experts_memory="packed")
    model.save_pretrained(tmp_path)
    again = _load(tmp_path, experts_memory="packed")
    assert torch.equal(_logits(again, input_ids), _logits(model, input_ids))
    with model.shared_experts_off():
        assert torch.equal(_logits(again, input_ids), _logits(model, input_ids))


def test_merge_check_proves_that_the_routers_take_part(routed: Path, kind: str) -> None:
    report = merge_check(routed)
    assert report.problems == []
    routers = {check.name for check in report.tensors if "router" in check.name}
    parameters = ("bias",) if kind == "bias" else ("bias", "weight")
    assert routers == {f"model.layers.{layer}.mlp.router.{name}" for layer in range(2) for name in parameters}
    assert f"all {14 + len(routers)} shared tensors" in summary(report)


@pytest.mark.parametrize("name", [f"{ROUTER}.bias", "model.layers.1.base_router.weight"])
def test_routers_that_were_changed_are_refused(routed: Path, tmp_path: Path, name: str) -> None:
    damaged = Path(shutil.copytree(routed, tmp_path / "damaged"))
    tensors = load_file(damaged / SHARD)
    tensors[name] = tensors[name] + 1
    save_file(tensors, damaged / SHARD, metadata={"format": "pt"})
    with pytest.raises(ArtefactError, match=r"the routers in .* are not those of the overlay"):
        merge_check(damaged)


@pytest.mark.parametrize("shard", ["weights.safetensors", "zz-00001-of-00001.safetensors", "model.safetensors"])
def test_the_trained_router_counts_whatever_the_bases_files_are_called(
    micro_model: Path, trained: Callable[..., Path], tmp_path: Path, shard: str
) -> None:
    """transformers reads two tensors of one name from two files; the later file's wins."""
    base = Path(shutil.copytree(micro_model, tmp_path / "base"))
    names = list(load_file(base / "model.safetensors"))
    if shard != "model.safetensors":
        (base / "model.safetensors").rename(base / shard)
        (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    directory = export(base, trained("all", base), tmp_path / "out").directory
    assert merge_check(directory).problems == []
    loaded = _load(directory, experts_memory="packed").model.layers[1].mlp.router
    assert torch.equal(loaded.weight, load_file(directory / SHARD)[f"{ROUTER}.weight"])


def test_an_export_without_trained_routers_has_no_second_router(exported: Path) -> None:
    assert not [name for name in load_file(exported / SHARD) if "router" in name]
    assert _load(exported, experts_memory="packed").model.layers[0].base_router is None
    assert "routers_sha256" not in json.loads((exported / "config.json").read_text())["shared_experts"]
