"""Identity of models: stable over versions of nexus-ray and over places; full hashes on demand."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import fsspec
import pytest
import torch

from nexus_ray.checkpoints import fingerprint as module
from nexus_ray.checkpoints.fingerprint import fingerprint, full_sha256
from nexus_ray.checkpoints.header import TensorSpec
from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.checkpoints.writer import CheckpointWriter
from nexus_ray.errors import ModelError

# Written down when artefacts began to record it: a change makes every run with the embedded model start again.
EMBEDDED = "b5742f2d7c3f61dbf36bbcd3aa7b84d367bb15e02a824d0304ac83ce328d1edc"


def test_the_embedded_model_keeps_its_fingerprint(tokenizer_directory: Path) -> None:
    assert fingerprint(tokenizer_directory) == EMBEDDED


def test_a_remote_model_has_the_fingerprint_of_its_files(micro_model: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(micro_model), "/fingerprint/micro", recursive=True)
    try:
        assert fingerprint("memory://fingerprint/micro") == fingerprint(micro_model)
        assert full_sha256("memory://fingerprint/micro") == full_sha256(micro_model)
    finally:
        filesystem.rm("/fingerprint", recursive=True)


def test_full_hashes_are_those_of_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_BYTES", 1000)
    specs = [TensorSpec(f"t{i}", torch.uint8, (2500,)) for i in range(3)]
    with CheckpointWriter(tmp_path, specs, shard_bytes=2500) as writer:
        for i, spec in enumerate(specs):
            writer.write(spec.name, torch.full(spec.shape, i, dtype=torch.uint8))
    expected = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(tmp_path.glob("*.safetensors"))
    }
    assert full_sha256(tmp_path) == expected
    assert len(set(expected.values())) == 3


def test_the_fingerprint_samples_and_the_hash_reads_everything(micro_model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(micro_model, tmp_path / "copy"))
    with CheckpointReader(copy) as reader:
        entry = reader.entry("model.embed_tokens.weight")
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[entry.start + 4096] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert fingerprint(copy) == fingerprint(micro_model)
    assert full_sha256(copy) != full_sha256(micro_model)
    content[entry.start + 4095] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert fingerprint(copy) != fingerprint(micro_model)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{i}", torch.uint8, (8,)) for i in range(2)]
    with CheckpointWriter(tmp_path, specs, shard_bytes=8, holes=True):
        pass
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        full_sha256(tmp_path)
