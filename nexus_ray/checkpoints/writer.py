"""Writing safetensors checkpoints as a stream: headers first, then each tensor at its place, in any order.

Names and shapes are known up front, so memory is that of the tensor at hand, the bytes do not depend on the order of
writing, and a file above the shard limit becomes several with an index, as Hugging Face checkpoints have it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from nexus_ray.checkpoints.header import DTYPES, METADATA, TensorEntry, TensorSpec, lay_out
from nexus_ray.storage import storage_error, write_json

__all__ = ["CheckpointWriter", "TensorSpec"]
_SHARD_BYTES = 5_000_000_000


@dataclass
class _Target:
    """A tensor's place, and which of its parts are written."""

    path: Path
    descriptor: int
    entry: TensorEntry
    whole: bool = False
    slices: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return self.whole or not self.entry.nbytes or len(self.slices) == (self.entry.shape or (1,))[0]


class CheckpointWriter:
    """Writes the tensors of a checkpoint into a directory, which the caller makes (and renames when complete).

    Use it as a context manager: a clean end checks that every tensor is written whole; an exception removes the files.

    Args:
        directory: an existing local directory, usually one of `storage.atomic_directory`.
        specs: every tensor of the checkpoint.
        stem: `{stem}.safetensors`, or `{stem}-00001-of-0000N.safetensors` and `{stem}.safetensors.index.json`.
        shard_bytes: most bytes of tensors in a file that holds more than one.
        metadata: strings for each file's header.
        holes: unwritten tensors are allowed and stay holes of a sparse file, which read as zeros.

    Raises:
        ValueError: a name comes twice, or a type has no safetensors name.
        StorageError: the file system refused; the files are removed.
    """

    def __init__(
        self,
        directory: Path,
        specs: Sequence[TensorSpec],
        *,
        stem: str = "model",
        shard_bytes: int = _SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
        holes: bool = False,
    ) -> None:
        _check_specs(specs)
        self._directory = directory
        self._index = directory / f"{stem}.safetensors.index.json"
        self._holes = holes
        self._metadata = dict(metadata or {"format": "pt"})
        self._shards = plan_shards(specs, stem, shard_bytes)
        self._targets: dict[str, _Target] = {}
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> Self:
        try:
            for name, specs in self._shards.items():
                self._start(self._directory / name, specs)
            if len(self._shards) > 1:
                self._write_index()
        except BaseException:
            self._close(remove=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        missing = [] if self._holes else [name for name, target in self._targets.items() if not target.complete]
        self._close(remove=error is not None or bool(missing))
        if missing and error is None:
            raise ValueError(f"{len(missing)} tensors are not written whole, the first is {missing[0]}")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor.

        Raises:
            ValueError: there is no such tensor, or its type or shape is another.
            StorageError: the file system refused, e.g. the disk is full.
        """
        target = self._target(name)
        _check_tensor(name, tensor, target.entry.dtype, target.entry.shape)
        self._put(target, target.entry.start, tensor)
        target.whole = True

    def write_slice(self, name: str, index: int, tensor: Tensor) -> None:
        """Write entry `index` of the first dimension.

        Raises:
            ValueError: there is no such tensor or entry, or its type or shape is another.
            StorageError: the file system refused, e.g. the disk is full.
        """
        target = self._target(name)
        entry = target.entry
        if not entry.shape or not 0 <= index < entry.shape[0]:
            raise ValueError(f"{name} of shape {list(entry.shape)} has no entry {index}")
        _check_tensor(f"{name}[{index}]", tensor, entry.dtype, entry.shape[1:])
        self._put(target, entry.start + index * (entry.nbytes // entry.shape[0]), tensor)
        target.slices.add(index)

    def _target(self, name: str) -> _Target:
        if name not in self._targets:
            raise ValueError(f"the checkpoint was planned without a tensor {name}")
        return self._targets[name]

    def _start(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        """Create one file of its final size, with its header."""
        head, entries = lay_out(specs, self._metadata)
        size = max((entry.stop for entry in entries), default=len(head))
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._descriptors[path] = descriptor
            os.ftruncate(descriptor, size)
            _write_all(descriptor, memoryview(head), 0)
        except OSError as error:
            raise storage_error(error, path) from error
        self._targets |= {entry.name: _Target(path, descriptor, entry) for entry in entries}

    def _put(self, target: _Target, offset: int, tensor: Tensor) -> None:
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        try:
            _write_all(target.descriptor, content.data, offset)
        except OSError as error:
            raise storage_error(error, target.path) from error

    def _write_index(self) -> None:
        weight_map = {spec.name: name for name, specs in self._shards.items() for spec in specs}
        total = sum(spec.nbytes for specs in self._shards.values() for spec in specs)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self._index, index)

    def _close(self, *, remove: bool) -> None:
        for path, descriptor in self._descriptors.items():
            os.close(descriptor)
            if remove:
                path.unlink(missing_ok=True)
        if remove and len(self._shards) > 1:
            self._index.unlink(missing_ok=True)
        self._descriptors.clear()


def plan_shards(specs: Iterable[TensorSpec], stem: str, shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """{file name: its tensors}, filled in the order given; a tensor above the limit gets a file of its own."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _check_specs(specs: Sequence[TensorSpec]) -> None:
    names = set()
    for spec in specs:
        if spec.name in names or spec.name == METADATA:
            raise ValueError(f"a checkpoint cannot have another tensor {spec.name}")
        if spec.dtype not in DTYPES.values():
            raise ValueError(f"{spec.name} has the type {spec.dtype}, which safetensors files here do not have")
        names.add(spec.name)


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{name} was planned as {dtype} {list(shape)}, but is {found}")


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], offset + done)
