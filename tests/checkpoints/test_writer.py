"""Writing checkpoints: the library's bytes, whatever the order; nothing left behind when the disk fills."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from checkpoints.files import FullDisk, tensors_of_every_type
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssForCausalLM

from nexus_ray.checkpoints.header import TensorSpec
from nexus_ray.checkpoints.quantised_export import export_mxfp4
from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.checkpoints.writer import CheckpointWriter, plan_shards
from nexus_ray.errors import StorageError
from nexus_ray.storage import atomic_directory

METADATA = {"format": "pt"}


def _specs(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def _write(directory: Path, tensors: dict[str, Tensor], names: Sequence[str] | None = None, **options: int) -> None:
    directory.mkdir(exist_ok=True)
    with CheckpointWriter(directory, _specs(tensors), **options) as writer:
        for name in names or tensors:
            writer.write(name, tensors[name])


@pytest.mark.parametrize("seed", range(4))
def test_the_file_is_the_librarys_to_the_byte(tmp_path: Path, seed: int) -> None:
    """In whatever order the tensors are planned and written."""
    tensors = tensors_of_every_type()
    save_file(tensors, tmp_path / "expected.safetensors", metadata=METADATA)
    planned, written = list(tensors), list(tensors)
    random.Random(seed).shuffle(planned)
    random.Random(seed + 100).shuffle(written)
    _write(tmp_path, {name: tensors[name] for name in planned}, written)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_strided_tensors_are_written_in_row_order(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(24).reshape(4, 6).T[1:, ::2], "b": torch.arange(9, dtype=torch.uint8)[::2]}
    _write(tmp_path, tensors)
    stored = load_file(tmp_path / "model.safetensors")
    assert all(stored[name].equal(tensor) for name, tensor in tensors.items())


def test_tensors_without_elements_need_no_writing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, [TensorSpec("a", torch.int16, (4, 0)), TensorSpec("b", torch.int16, (0, 4))]):
        pass
    assert {name: list(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()} == {
        "a": [4, 0],
        "b": [0, 4],
    }


def test_slices_make_the_whole(tmp_path: Path) -> None:
    tensor = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    with CheckpointWriter(tmp_path, _specs({"a": tensor})) as writer:
        for index in (3, 0, 4, 1, 2):
            writer.write_slice("a", index, tensor[index])
    assert load_file(tmp_path / "model.safetensors")["a"].equal(tensor)


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((16,), float(i)) for i in range(7)} | {"big": torch.arange(100.0)}
    _write(tmp_path, tensors, shard_bytes=130)
    files = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {name: load_file(tmp_path / file)[name].tolist() for name, file in index["weight_map"].items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    with CheckpointReader(tmp_path) as reader:
        assert reader.shards == [tmp_path / file for file in files]
        assert all(reader.read(name).equal(tensor) for name, tensor in tensors.items())


def test_shards_are_filled_in_order_up_to_the_limit() -> None:
    specs = [TensorSpec(str(size), torch.uint8, (size,)) for size in (40, 60, 1, 500, 99, 2)]
    shards = plan_shards(specs, "x", 100)
    assert [[spec.name for spec in shard] for shard in shards.values()] == [["40", "60"], ["1"], ["500"], ["99"], ["2"]]
    assert list(plan_shards(specs, "x", 702)) == ["x.safetensors"]
    assert list(plan_shards([], "x", 1)) == ["x.safetensors"]
    assert list(plan_shards(specs[:1], "x", 1)) == ["x.safetensors"]


def test_holes_take_no_disk_and_read_as_zeros(tmp_path: Path) -> None:
    specs = [TensorSpec("a", torch.bfloat16, (1000, 2**20)), TensorSpec("b", torch.int64, (2,))]
    with CheckpointWriter(tmp_path, specs, holes=True) as writer:
        writer.write("b", torch.tensor([3, 4]))
    status = (tmp_path / "model.safetensors").stat()
    assert status.st_size > 2_000 * 2**20
    assert status.st_blocks * 512 < 2**20
    with CheckpointReader(tmp_path) as reader:
        assert reader.read("b").tolist() == [3, 4]
        assert not reader.read_slice("a", 999).any()


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """64 tensors of 4 MiB, none of which is kept."""
    specs = [TensorSpec(str(i), torch.uint8, (4 * 2**20,)) for i in range(64)]
    with CheckpointWriter(tmp_path, specs) as writer:
        before = _anonymous_bytes()
        for spec in specs:
            writer.write(spec.name, torch.ones(spec.shape, dtype=torch.uint8))
        assert _anonymous_bytes() - before < 24 * 2**20


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda writer: writer.write("a", torch.zeros(3)),
            r"a was planned as .*32 \[2, 2\], but is .* \[3\]",
        ),
        (lambda writer: writer.write("a", torch.zeros(2, 2).half()), r"but is torch\.float16"),
        (lambda writer: writer.write("c", torch.zeros(2, 2)), "planned without a tensor c"),
        (lambda writer: writer.write_slice("a", 0, torch.zeros(2, 2)), r"a\[0\] was planned as torch\.float32 \[2\]"),
        (lambda writer: writer.write_slice("a", 2, torch.zeros(2)), "has no entry 2"),
        (lambda writer: writer.write_slice("a", -1, torch.zeros(2)), "has no entry -1"),
        (lambda writer: writer.write_slice("b", 0, torch.zeros(())), "has no entry 0"),
        (lambda writer: writer.write("b", torch.zeros(())), "1 tensors are not written whole, the first is a"),
        (lambda writer: writer.write_slice("a", 1, torch.zeros(2)), "2 tensors are not written whole, the first is b"),
    ],
    ids=["shape", "dtype", "name", "slice shape", "high", "low", "scalar", "one missing", "half missing"],
)
def test_mistakes_leave_no_file(tmp_path: Path, act: Callable[[CheckpointWriter], None], message: str) -> None:
    specs = [TensorSpec("b", torch.float32, ()), TensorSpec("a", torch.float32, (2, 2))]

    def write() -> None:
        with CheckpointWriter(tmp_path, specs, shard_bytes=4) as writer:
            act(writer)

    with pytest.raises(ValueError, match=message):
        write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([TensorSpec("a", torch.int8, (1,)), TensorSpec("a", torch.int8, (2,))], "another tensor a"),
        ([TensorSpec("__metadata__", torch.int8, (1,))], "another tensor __metadata__"),
        ([TensorSpec("a", torch.complex128, (1,))], r"a has the type torch\.complex128"),
    ],
)
def test_plans_that_no_file_can_hold(tmp_path: Path, specs: list[TensorSpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointWriter(tmp_path, specs)


@pytest.mark.parametrize("room", [0, 50, 150, 700, 2200])
def test_a_disk_that_fills_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(6)}
    monkeypatch.setattr(os, "pwrite", FullDisk(room))
    with pytest.raises(StorageError, match=r"model-0000\d-of-00003\.safetensors: the disk is full"):
        _write(tmp_path, tensors, shard_bytes=800)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_leaves_what_stood_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(6)}
    _write(tmp_path / "model", tensors)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    monkeypatch.setattr(os, "pwrite", FullDisk(1500))

    def replace() -> None:
        with atomic_directory(tmp_path / "model") as temporary:
            _write(temporary, {name: tensor + 1 for name, tensor in tensors.items()})

    with pytest.raises(StorageError, match="the disk is full"):
        replace()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", FullDisk(10**9))
    tensors = tensors_of_every_type()
    _write(tmp_path, tensors)
    assert load_file(tmp_path / "model.safetensors")["layer.F64"].equal(tensors["layer.F64"])


def test_a_file_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("precious")
    with pytest.raises(StorageError, match=r"model\.safetensors: a file stands"):
        _write(tmp_path, {"a": torch.zeros(1)})
    assert (tmp_path / "model.safetensors").read_text() == "precious"


def test_a_sharded_export_of_a_model_is_the_same_model(micro_model: Path, tmp_path: Path) -> None:
    """MXFP4 values are on the grid already, so packing them again gives the same bytes."""
    model = GptOssForCausalLM.from_pretrained(micro_model, dtype=torch.float32)
    export_mxfp4(model, micro_model, tmp_path / "sharded", shard_bytes=200_000)
    expected = load_file(micro_model / "model.safetensors")
    with CheckpointReader(tmp_path / "sharded") as reader:
        assert len(reader.shards) > 2
        assert reader.names == sorted(expected)
        assert all(reader.read(name).equal(tensor) for name, tensor in expected.items())
    again, info = GptOssForCausalLM.from_pretrained(tmp_path / "sharded", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.lm_head.weight.equal(expected["lm_head.weight"].to(again.dtype))
