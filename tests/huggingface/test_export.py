"""An export is complete or absent, and the base never notices it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from nexus_ray.checkpoints.overlay import load_overlay_config, save_overlay
from nexus_ray.cli import run_command
from nexus_ray.config import save_config
from nexus_ray.errors import ArtefactError, ConfigError, ModelError, StorageError
from nexus_ray.huggingface import export as module
from nexus_ray.huggingface.export import describe, export, exported_name, overlay_name, tensors_digest
from nexus_ray.storage import sha256_file

SHARED = "model-shared-experts.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(micro_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro_model, tmp_path / "base"))


def _state(directory: Path) -> dict[str, tuple[str, int]]:
    return {file.name: (sha256_file(file), file.stat().st_mode) for file in directory.iterdir()}


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_the_directory_is_whole(base: Path, micro_overlay: Path, tmp_path: Path) -> None:
    done = export(base, micro_overlay, tmp_path / "deep" / "out")
    assert _names(done.directory) == {*_names(base) - {"model.safetensors"}, "model-base.safetensors", SHARED} | {
        INDEX,
        "README.md",
    }
    config = json.loads((done.directory / "config.json").read_text())
    own = json.loads((base / "config.json").read_text())
    assert config["model_type"] == "nexus_gpt_oss"
    assert config["architectures"] == ["NexusGptOssForCausalLM"]
    assert config["quantization_config"] == own["quantization_config"]
    assert config["shared_experts"]["base_fingerprint"] == load_overlay_config(micro_overlay).base_fingerprint
    assert config["shared_experts"]["width"] == 64
    assert {key for key in own if config[key] != own[key]} == {"model_type", "architectures"}
    assert len(AutoTokenizer.from_pretrained(done.directory)) == len(AutoTokenizer.from_pretrained(base))
    assert "import nexus_ray" in (done.directory / "README.md").read_text()
    assert "(1.2 MB of the base linked, 0.1 MB in 14 tensors added)" in describe(done)


def test_the_index_places_every_tensor(base: Path, micro_overlay: Path, tmp_path: Path) -> None:
    directory = export(base, micro_overlay, tmp_path / "out").directory
    index = json.loads((directory / INDEX).read_text())
    found, total = {}, 0
    for shard in sorted(set(index["weight_map"].values())):
        tensors = load_file(directory / shard)
        found |= dict.fromkeys(tensors, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == total
    assert set(load_file(base / "model.safetensors")) == {name for name, shard in found.items() if shard != SHARED}


def test_shared_tensors_are_the_overlays_bit_for_bit(base: Path, micro_overlay: Path, tmp_path: Path) -> None:
    directory = export(base, micro_overlay, tmp_path / "out").directory
    stored, expected = load_file(directory / SHARED), load_file(micro_overlay / "overlay.safetensors")
    assert set(stored) == {exported_name(name) for name in expected}
    for name, tensor in expected.items():
        assert stored[exported_name(name)].dtype == tensor.dtype
        assert torch.equal(stored[exported_name(name)], tensor)
        assert overlay_name(exported_name(name)) == name
    assert overlay_name("model.layers.0.mlp.router.weight") is None


@pytest.mark.parametrize("mode", [0o644, 0o444, 0o600])
def test_the_base_is_linked_and_stays_as_it_was(base: Path, micro_overlay: Path, tmp_path: Path, mode: int) -> None:
    (base / "model.safetensors").chmod(mode)
    before = _state(base)
    done = export(base, micro_overlay, tmp_path / "out")
    linked = (done.directory / "model-base.safetensors").stat()
    assert linked.st_ino == (base / "model.safetensors").stat().st_ino
    assert (done.linked_bytes, done.copied_bytes) == (linked.st_size, 0)
    assert _state(base) == before
    export(base, micro_overlay, tmp_path / "out", overwrite=True)
    shutil.rmtree(tmp_path / "out")
    assert _state(base) == before


def test_a_base_of_links_like_a_hub_cache(base: Path, micro_overlay: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in base.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / "base" / file.name)
    directory = export(snapshot, micro_overlay, tmp_path / "out").directory
    assert not any(file.is_symlink() for file in directory.iterdir())
    shutil.rmtree(snapshot)
    assert sha256_file(directory / "model-base.safetensors") == sha256_file(base / "model.safetensors")


def test_shards_keep_their_names(base: Path, micro_overlay: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    halves = [sorted(tensors)[::2], sorted(tensors)[1::2]]
    weight_map = {}
    for number, names in enumerate(halves):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, base / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    (base / "model.safetensors").unlink()
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    overlay = _for_base(base, micro_overlay, tmp_path)
    directory = export(base, overlay, tmp_path / "out").directory
    found = json.loads((directory / INDEX).read_text())["weight_map"]
    assert {name: shard for name, shard in found.items() if shard != SHARED} == weight_map
    assert (directory / "model-00001-of-00002.safetensors").stat().st_nlink == 2


def _for_base(base: Path, overlay: Path, tmp_path: Path) -> Path:
    """A copy of an overlay that says it belongs to `base`."""
    from nexus_ray.checkpoints.fingerprint import fingerprint

    description = load_overlay_config(overlay).model_copy(update={"base_fingerprint": fingerprint(base)})
    save_overlay(tmp_path / "adopted", description, load_file(overlay / "overlay.safetensors"))
    return tmp_path / "adopted"


def _no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


def test_another_file_system_gets_copies(base: Path, micro_overlay: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "link", _no_links)
    monkeypatch.setattr(module, "_CHUNK", 100_000)
    done = export(base, micro_overlay, tmp_path / "out")
    copied = done.directory / "model-base.safetensors"
    assert copied.stat().st_nlink == 1
    assert sha256_file(copied) == sha256_file(base / "model.safetensors")
    assert (done.linked_bytes, done.copied_bytes) == (0, copied.stat().st_size)


def test_a_disk_that_is_too_small_is_known_before_writing(base, micro_overlay, tmp_path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    with pytest.raises(StorageError, match=r"it takes 0\.07 GB and 0\.00 GB are free"):
        export(base, micro_overlay, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_while_writing_leaves_nothing(base, micro_overlay, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = _state(base)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="disk is full"):
        export(base, micro_overlay, tmp_path / "out")
    assert _names(tmp_path) == {"base"}
    assert _state(base) == before


def test_a_failing_check_leaves_the_earlier_export(base: Path, micro_overlay: Path, tmp_path: Path) -> None:
    export(base, micro_overlay, tmp_path / "out")
    (tmp_path / "out" / "mark").write_text("earlier")
    seen = []

    def check(directory: Path) -> None:
        seen.append(_names(directory))
        raise ArtefactError("not sound")

    with pytest.raises(ArtefactError, match="not sound"):
        export(base, micro_overlay, tmp_path / "out", overwrite=True, check=check)
    assert seen == [_names(tmp_path / "out") - {"mark"}]
    assert (tmp_path / "out" / "mark").exists()
    assert _names(tmp_path) == {"base", "out"}


def test_only_an_earlier_export_is_replaced(base: Path, micro_overlay: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export(base, micro_overlay, tmp_path / "empty")
    with pytest.raises(ConfigError, match="already holds an export") as caught:
        export(base, micro_overlay, tmp_path / "empty")
    assert "--overwrite" in (caught.value.hint or "")
    (tmp_path / "file").write_text("")
    for place in (base, tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="is not an export"):
            export(base, micro_overlay, place, overwrite=True)
    assert _names(tmp_path) == {"base", "empty", "file"}


def test_an_export_is_not_a_base(base: Path, micro_overlay: Path, tmp_path: Path) -> None:
    directory = export(base, micro_overlay, tmp_path / "out").directory
    with pytest.raises(ModelError, match="already contains shared experts"):
        export(directory, micro_overlay, tmp_path / "twice")


def test_an_overlay_of_another_base_is_refused(base: Path, micro_overlay: Path, tmp_path: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtefactError, match="was made for the base"):
        export(base, micro_overlay, tmp_path / "out")


def test_a_base_that_is_not_there_is_refused(micro_overlay: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no directory at"):
        export(tmp_path / "base", micro_overlay, tmp_path / "out")


def test_the_digest_is_that_of_names_and_bytes() -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(2, dtype=torch.bfloat16)}
    names = {name: name for name in tensors}
    digest = tensors_digest(names, tensors.__getitem__)
    assert tensors_digest(dict(reversed(names.items())), tensors.__getitem__) == digest
    for change in ({"b": torch.tensor([1, 1 + 2**-23])}, {"b": torch.ones(2, 1)}, {"b": tensors["a"]}):
        assert tensors_digest(names, (tensors | change).__getitem__) != digest
    assert tensors_digest({"c": "b", "a": "a"}, tensors.__getitem__) != digest


def test_the_command(make_micro_config, micro_overlay: Path, tmp_path: Path, capsys) -> None:
    save_config(make_micro_config(tmp_path / "run"), tmp_path / "c.yaml")
    arguments = ["export", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "out")]
    assert run_command(arguments) == 1
    assert f"no overlay at {tmp_path}" in " ".join(capsys.readouterr().err.split())
    shutil.copytree(micro_overlay, tmp_path / "run" / "overlay")
    assert run_command(arguments) == 0
    printed = capsys.readouterr().out
    assert "ok: all 14 shared tensors" in printed
    assert "export: " in printed
    assert run_command(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    again = [*arguments, "--overwrite", "--no-check", "--overlay", str(micro_overlay)]
    assert run_command(again) == 0
    assert "ok" not in capsys.readouterr().out
    with safe_open(tmp_path / "out" / SHARED, "pt") as file:
        assert len(file.keys()) == 14
