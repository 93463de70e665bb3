"""Reading checkpoints: plain, mapped and remote reads give the file's bytes, and no more of them than asked for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from checkpoints.files import CountingFile, tensors_of_every_type
from safetensors.torch import load_file, save_file
from torch import Tensor

from nexus_ray.checkpoints import byte_files, reader
from nexus_ray.checkpoints.byte_files import ByteFile
from nexus_ray.checkpoints.header import TensorSpec
from nexus_ray.checkpoints.reader import CheckpointReader, read_model_config
from nexus_ray.checkpoints.writer import CheckpointWriter
from nexus_ray.errors import ModelError
from nexus_ray.storage import Place, sha256_file


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint of every element type, written by the safetensors library."""
    save_file(tensors_of_every_type(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def remote(directory: Path) -> Iterator[str]:
    """The same checkpoint on fsspec's in-memory file system."""
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(directory), "/models/every", recursive=True)
    yield "memory://models/every"
    filesystem.rm("/models", recursive=True)


def _same(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return left.reshape(-1).view(torch.uint8).equal(right.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("way", ["plain", "mapped", "remote"])
def test_every_type_reads_as_the_library_reads_it(directory: Path, way: str, request: pytest.FixtureRequest) -> None:
    place = request.getfixturevalue("remote") if way == "remote" else directory
    expected = load_file(directory / "model.safetensors")
    with CheckpointReader(place, mapped=way == "mapped") as checkpoint:
        assert checkpoint.names == sorted(expected)
        for name, tensor in expected.items():
            assert _same(checkpoint.read(name), tensor)
            assert checkpoint.shape(name) == list(tensor.shape)
            for index in range(len(tensor) if tensor.dim() > 1 else 0):
                assert _same(checkpoint.read_slice(name, index), tensor[index])
                assert _same(checkpoint.read_rows(name, index, 1, 2), tensor[index, 1:2])
                assert _same(checkpoint.read_rows(name, index, 0, 0), tensor[index, :0])


def test_remote_reads_in_pieces_are_joined(remote: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_files, "_REMOTE_PIECE_BYTES", 7)
    with CheckpointReader(remote) as checkpoint:
        assert _same(
            checkpoint.read("layer.F32"), load_file(directory / "model.safetensors", device="cpu")["layer.F32"]
        )


@pytest.mark.parametrize("mapped", [False, True])
def test_tensors_outlive_the_reader(directory: Path, mapped: bool) -> None:
    with CheckpointReader(directory, mapped=mapped) as checkpoint:
        tensor = checkpoint.read("layer.I64")
    assert _same(tensor, load_file(directory / "model.safetensors")["layer.I64"])


@pytest.mark.parametrize("mapped", [False, True])
def test_writing_to_what_was_read_never_reaches_the_file(directory: Path, mapped: bool) -> None:
    before = sha256_file(directory / "model.safetensors")
    with CheckpointReader(directory, mapped=mapped) as checkpoint:
        tensor = checkpoint.read("layer.F32")
        tensor.fill_(7.0)
        assert tensor.eq(7.0).all()
    assert sha256_file(directory / "model.safetensors") == before


def test_mapped_tensors_are_views_on_one_mapping(directory: Path) -> None:
    with CheckpointReader(directory, mapped=True) as checkpoint:
        entry = checkpoint.entry("layer.F32")
        first, second = checkpoint.read("layer.F32"), checkpoint.read_slice("layer.F32", 1)
        assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        assert second.data_ptr() - first.data_ptr() == entry.nbytes // 3


@pytest.mark.parametrize("mapped", [False, True])
def test_unaligned_files_read_right(tmp_path: Path, mapped: bool) -> None:
    """Nothing in the format promises alignment: here the data start at an odd byte."""
    text = (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[2],"data_offsets":[8,10]}}'
    )
    text += b" " * (1 - len(text) % 2)
    values = torch.tensor([1.5, -2.0])
    content = len(text).to_bytes(8, "little") + text + values.numpy().tobytes() + b"\x05\x06"
    (tmp_path / "model.safetensors").write_bytes(content)
    with CheckpointReader(tmp_path, mapped=mapped) as checkpoint:
        assert checkpoint.entry("a").start % 2 == 1
        assert checkpoint.read("a").equal(values)
        assert checkpoint.read("b").view(torch.uint16).item() == 0x0605


@pytest.fixture
def counted(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The byte ranges that readers ask for, header reads included."""
    ranges: list[tuple[int, int]] = []

    def counting(location: Place, *, mapped: bool = False) -> ByteFile:
        assert isinstance(location, Path)
        return CountingFile(location, ranges)

    monkeypatch.setattr(reader, "open_file", counting)
    return ranges


def test_only_the_bytes_asked_for_are_read(directory: Path, counted: list[tuple[int, int]]) -> None:
    with CheckpointReader(directory) as checkpoint:
        entry = checkpoint.entry("layer.F32")  # [3, 2, 8]
        header = counted.copy()
        assert max(stop for _, stop in header) <= min(checkpoint.entry(name).start for name in checkpoint.names)
        checkpoint.read_slice("layer.F32", 2)
        checkpoint.read_rows("layer.F32", 1, 1, 2)
        checkpoint.shape("layer.I8")
    assert counted[len(header) :] == [(entry.start + 128, entry.stop), (entry.start + 96, entry.start + 128)]


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_slices_of_a_large_file_leave_memory_flat(tmp_path: Path) -> None:
    """A sparse file of 4 GiB, 128 slices of 4 MiB: a mapping, or the whole tensor, would show."""
    spec = TensorSpec("experts", torch.uint8, (1024, 4 * 2**20))
    with CheckpointWriter(tmp_path, [spec], holes=True) as writer:
        writer.write_slice("experts", 1000, torch.full(spec.shape[1:], 9, dtype=torch.uint8))
    assert (tmp_path / "model.safetensors").stat().st_size > 2**32
    with CheckpointReader(tmp_path) as checkpoint:
        before = _resident_bytes()
        for index in range(0, 1024, 8):
            tensor = checkpoint.read_slice("experts", index)
            assert tensor.min() == tensor.max() == (9 if index == 1000 else 0)
        assert _resident_bytes() - before < 32 * 2**20


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda checkpoint: checkpoint.read("nothing"), "has no tensor nothing"),
        (lambda checkpoint: checkpoint.read_slice("layer.F32", 3), r"shape \[3, 2, 8\]: its first dimension has no e"),
        (lambda checkpoint: checkpoint.read_slice("layer.F32", -1), "has no entry -1"),
        (lambda checkpoint: checkpoint.read_slice("scalar", 0), r"shape \[\]: its first dimension has no entry 0"),
        (lambda checkpoint: checkpoint.read_slice("empty", 0), r"shape \[0, 4\]: its first dimension has no entry 0"),
        (lambda checkpoint: checkpoint.read_rows("layer.F32", 0, 1, 3), "entry 0 has no rows 1 to 3"),
        (lambda checkpoint: checkpoint.read_rows("layer.F32", 0, 2, 1), "entry 0 has no rows 2 to 1"),
    ],
)
def test_what_a_tensor_does_not_have(directory: Path, read, message: str) -> None:
    with CheckpointReader(directory) as checkpoint, pytest.raises(ModelError, match=message):
        read(checkpoint)


def test_a_file_that_shrinks_while_it_is_read(directory: Path) -> None:
    with CheckpointReader(directory) as checkpoint:
        name = max(checkpoint.names, key=lambda name: checkpoint.entry(name).stop)
        os.truncate(directory / "model.safetensors", checkpoint.entry(name).stop - 1)
        with pytest.raises(ModelError, match="is cut off"):
            checkpoint.read(name)


def _index(directory: Path, weight_map: object) -> None:
    """Replace the single file by a shard and an index."""
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_may_leave_tensors_out(directory: Path) -> None:
    _index(directory, {"scalar": "a.safetensors"})
    with CheckpointReader(directory) as checkpoint:
        assert checkpoint.names == ["scalar"]
        assert checkpoint.shards == [directory / "a.safetensors"]
        assert checkpoint.read("scalar").item() == 1.5
        assert "empty" not in checkpoint


def test_an_index_that_promises_a_tensor(directory: Path) -> None:
    _index(directory, {"more": "a.safetensors"})
    with (
        CheckpointReader(directory) as checkpoint,
        pytest.raises(ModelError, match=r"a\.safetensors has no tensor more, but the checkpoint's index says so"),
    ):
        checkpoint.read("more")


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "..", ".", "", "s3://bucket/x", "sub/../../x", 7, None, "a/b"]
)
def test_an_index_cannot_leave_the_directory(directory: Path, shard: object) -> None:
    _index(directory, {"scalar": shard})
    with pytest.raises(ModelError, match=r"index\.json places scalar in .* not a file of its directory"):
        CheckpointReader(directory)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', "7", '"weight_map"', "[" * 100_000, "\udc80"], ids=range(8)
)
def test_a_damaged_index_is_named(directory: Path, text: str) -> None:
    (directory / "model.safetensors.index.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is damaged"):
        CheckpointReader(directory)


def test_a_pipe_is_not_waited_for(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")
    with pytest.raises(ModelError, match="not a regular file"):
        CheckpointReader(directory)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("memory://nowhere", "has neither"),
        ("unknown-storage://bucket/model", "no kind of storage"),
        ("memory://models/every", "cannot be memory-mapped"),
    ],
)
def test_remote_places_that_cannot_be_used(remote: str, uri: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        CheckpointReader(uri, mapped="mapped" in message)


def test_a_remote_file_that_fails_while_it_is_read(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointReader(remote) as checkpoint:
        filesystem = fsspec.filesystem("memory")
        monkeypatch.setattr(type(filesystem), "cat_file", lambda self, path, start, end: b"short"[: end - start])
        with pytest.raises(ModelError, match=r"memory://models/every/model\.safetensors is cut off"):
            checkpoint.read("layer.F32")
        filesystem.rm("/models/every/model.safetensors")
        monkeypatch.undo()
        with pytest.raises(ModelError, match="cannot be read"):
            checkpoint.read("layer.F32")


def test_configuration_of_a_remote_model(micro_model: Path, remote: str) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(micro_model / "config.json"), "/models/every/config.json")
    assert read_model_config(remote) == read_model_config(micro_model)
    with pytest.raises(ModelError, match=r"no directory at memory://models/other"):
        read_model_config("memory://models/other")


def test_a_reader_closes_its_files(directory: Path) -> None:
    shutil.copyfile(directory / "model.safetensors", directory / "b.safetensors")
    _index(directory, {"scalar": "a.safetensors", "empty": "b.safetensors"})
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    with CheckpointReader(directory) as checkpoint:
        checkpoint.read("scalar")
        checkpoint.read("empty")
        assert len(list(descriptors.iterdir())) == before + 2
    assert len(list(descriptors.iterdir())) == before
    (directory / "a.safetensors").write_bytes(b"damaged")
    with CheckpointReader(directory) as checkpoint, pytest.raises(ModelError, match="is damaged"):
        checkpoint.read("scalar")
    assert len(list(descriptors.iterdir())) == before
