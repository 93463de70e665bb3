"""Reading a Hugging Face checkpoint lazily: one tensor, or one expert's slice of a tensor, at a time."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nexus_ray.errors import ModelError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def read_model_config(path: Path) -> dict[str, Any]:
    """Read `config.json` of a Hugging Face directory.

    Raises:
        ModelError: the directory or the file is missing or damaged.
    """
    if not path.is_dir():
        raise ModelError(f"model.path: no directory at {path}", "set model.path to a Hugging Face model directory")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"model.path: {path} has no config.json", "is it a Hugging Face model directory?") from error
    except ValueError as error:
        raise ModelError(f"model.path: {path}/config.json is not JSON: {error}", "download it again") from error
    if not isinstance(config, dict):
        raise ModelError(f"model.path: {path}/config.json is not an object", "download it again")
    return config


class CheckpointReader:
    """Tensors of a checkpoint directory by name; nothing is read until it is asked for.

    Use it as a context manager. `name in reader` says whether a tensor exists.

    Raises:
        ModelError: the directory holds no safetensors, a shard is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._shard_of = _index(directory)
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._shard_of)

    @property
    def shards(self) -> list[Path]:
        """The safetensors files, sorted."""
        return [self.directory / name for name in sorted(set(self._shard_of.values()))]

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor, from the header only."""
        return list(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Element type of a tensor as the file names it, e.g. "BF16", "U8"; from the header only."""
        return str(self._file(name).get_slice(name).get_dtype())

    def read(self, name: str) -> Tensor:
        """Read one whole tensor."""
        tensor: Tensor = self._file(name).get_tensor(name)
        return tensor

    def read_slice(self, name: str, index: int) -> Tensor:
        """Read entry `index` of the first dimension, and only its bytes."""
        tensor: Tensor = self._file(name).get_slice(name)[index]
        return tensor

    def _file(self, name: str) -> Any:
        if name not in self._shard_of:
            raise ModelError(f"{self.directory} has no tensor {name}", "is the checkpoint complete?")
        shard = self._shard_of[name]
        if shard not in self._open:
            self._open[shard] = _open_shard(self.directory / shard)
        return self._open[shard]


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt").__enter__()
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing", "download the model again") from error
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged: {error}", "download the model again") from error


def _index(directory: Path) -> dict[str, str]:
    """{tensor name: shard file name}."""
    index = directory / _INDEX
    if index.exists():
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{index} is damaged: {error!r}", "download the model again") from error
    if (directory / _SINGLE).exists():
        return dict.fromkeys(_open_shard(directory / _SINGLE).keys(), _SINGLE)
    raise ModelError(f"{directory} has neither {_INDEX} nor {_SINGLE}", "the base model must be in safetensors form")
