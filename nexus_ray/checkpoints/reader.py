"""Reading a Hugging Face checkpoint lazily: one tensor, one expert's slice or some of its rows at a time."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import PurePosixPath
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from nexus_ray.checkpoints.byte_files import ByteFile, exists, locate, open_file, read_whole
from nexus_ray.checkpoints.header import Header, TensorEntry, read_header
from nexus_ray.errors import ModelError
from nexus_ray.storage import Place

_DOWNLOAD = "download the model again"


def read_model_config(path: Place | str) -> dict[str, Any]:
    """Read `config.json` of a Hugging Face directory, local or remote.

    Raises:
        ModelError: the directory or the file is missing or damaged.
    """
    directory = locate(path)
    if not exists(directory):
        raise ModelError(f"model.path: no directory at {path}", "set model.path to a Hugging Face model directory")
    place = directory / "config.json"
    if not exists(place):
        raise ModelError(f"model.path: {path} has no config.json", "is it a Hugging Face model directory?")
    try:
        config = json.loads(read_whole(place).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"model.path: {place} is not JSON: {error}", "download it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"model.path: {place} is not an object", "download it again")
    return config


def checkpoint_bytes(directory: Place) -> int:
    """Bytes of the files that a model's weights are in.

    Raises:
        ModelError: the model is missing or damaged.
    """
    with CheckpointReader(directory) as reader:
        shards = reader.shards
    size = 0
    for shard in shards:
        with closing(open_file(shard)) as file:
            size += file.size
    return size


class CheckpointReader:
    """Tensors of a checkpoint directory by name; nothing is read until it is asked for.

    Use it as a context manager. `name in reader` says whether a tensor exists.

    Args:
        directory: local directory, or a URI.
        mapped: tensors are views on a private mapping of the (local) files, which the processes of a machine share
            and writes to which never reach the file; otherwise each read takes memory of its own.
        stem: file names begin with it: `{stem}.safetensors` or `{stem}.safetensors.index.json`.

    Raises:
        ModelError: the directory holds no safetensors, its index or a file is damaged, or a URI was to be mapped.
    """

    def __init__(self, directory: Place | str, *, mapped: bool = False, stem: str = "model") -> None:
        self.directory = locate(directory)
        self._mapped = mapped
        self._open: dict[str, tuple[ByteFile, Header]] = {}
        self._shard_of = self._list_tensors(stem)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._shard_of)

    @property
    def shards(self) -> list[Place]:
        """The safetensors files, sorted."""
        return [self.directory / name for name in sorted(set(self._shard_of.values()))]

    def shard(self, name: str) -> Place:
        """The file that holds a tensor.

        Raises:
            ModelError: there is no such tensor.
        """
        return self.directory / self._shard_name(name)

    def entry(self, name: str) -> TensorEntry:
        """Type, shape and place of a tensor, from the header only.

        Raises:
            ModelError: there is no such tensor, or its file is missing or damaged.
        """
        return self._find(name)[1]

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor, from the header only."""
        return list(self.entry(name).shape)

    def read(self, name: str) -> Tensor:
        """Read one whole tensor."""
        file, entry = self._find(name)
        return _read(file, entry, entry.start, entry.shape)

    def read_slice(self, name: str, index: int) -> Tensor:
        """Read entry `index` of the first dimension, and only its bytes.

        Raises:
            ModelError: the tensor has no such entry, or cannot be read.
        """
        file, entry = self._find(name)
        start, shape = _entry_of(entry, index)
        return _read(file, entry, start, shape)

    def read_rows(self, name: str, index: int, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of entry `index` of the first dimension, and only their bytes.

        Raises:
            ModelError: the tensor has no such entry or rows, or cannot be read.
        """
        file, entry = self._find(name)
        begin, shape = _entry_of(entry, index)
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise ModelError(f"{name} has shape {list(entry.shape)}: entry {index} has no rows {start} to {stop}")
        row_bytes = entry.nbytes // (entry.shape[0] * shape[0]) if stop > start else 0
        return _read(file, entry, begin + start * row_bytes, (stop - start, *shape[1:]))

    def _find(self, name: str) -> tuple[ByteFile, TensorEntry]:
        file, header = self._opened(self._shard_name(name))
        if name not in header.entries:
            raise ModelError(f"{file.location} has no tensor {name}, but the checkpoint's index says so", _DOWNLOAD)
        return file, header.entries[name]

    def _shard_name(self, name: str) -> str:
        if name not in self._shard_of:
            raise ModelError(f"{self.directory} has no tensor {name}", "is the checkpoint complete?")
        return self._shard_of[name]

    def _opened(self, name: str) -> tuple[ByteFile, Header]:
        if name not in self._open:
            file = open_file(self.directory / name, mapped=self._mapped)
            try:
                self._open[name] = (file, read_header(file))
            except ModelError:
                file.close()
                raise
        return self._open[name]

    def _close(self) -> None:
        for file, _ in self._open.values():
            file.close()
        self._open.clear()

    def _list_tensors(self, stem: str) -> dict[str, str]:
        """{tensor name: file name}."""
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if exists(self.directory / index):
            return _read_index(self.directory / index)
        if exists(self.directory / single):
            return dict.fromkeys(self._opened(single)[1].entries, single)
        raise ModelError(f"{self.directory} has neither {index} nor {single}", "it must be in safetensors form")


def _entry_of(entry: TensorEntry, index: int) -> tuple[int, tuple[int, ...]]:
    """First byte and shape of entry `index` of the first dimension."""
    if not entry.shape or not 0 <= index < entry.shape[0]:
        raise ModelError(f"{entry.name} has shape {list(entry.shape)}: its first dimension has no entry {index}")
    return entry.start + index * (entry.nbytes // entry.shape[0]), entry.shape[1:]


def _read(file: ByteFile, entry: TensorEntry, start: int, shape: tuple[int, ...]) -> Tensor:
    size = entry.dtype.itemsize
    for length in shape:
        size *= length
    content = file.read(start, start + size)
    # A mapped file that another program wrote without alignment; packed bytes are looked up two at a time.
    if content.data_ptr() % max(entry.dtype.itemsize, 2):
        content = content.clone()
    return content.view(entry.dtype).reshape(shape)


def _read_index(index: Place) -> dict[str, str]:
    """{tensor name: file name} from an index file."""
    try:
        weight_map = json.loads(read_whole(index).decode("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{index} is damaged: {error!r}", _DOWNLOAD) from error
    if not isinstance(weight_map, dict):
        raise ModelError(f"{index} is damaged: weight_map is not an object", _DOWNLOAD)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise ModelError(f"{index} places {name} in {shard!r}, which is not a file of its directory", _DOWNLOAD)
    return weight_map


def _is_plain_name(shard: str) -> bool:
    return PurePosixPath(shard).name == shard and shard not in ("", "..")
