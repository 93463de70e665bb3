"""Reading a target set: an index of all its sequences, and batches of them as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_ray.errors import ArtefactError
from nexus_ray.storage import sha256_file
from nexus_ray.targets.compression import TopK
from nexus_ray.targets.format import REMAKE, Manifest, read_table


@dataclass(frozen=True)
class TargetBatch:
    """Sequences of one source with what the teacher said about them.

    Attributes:
        input_ids: [sequences, length] int64.
        num_tokens: [sequences] tokens before the padding.
        top: teacher distributions of the next token [sequences, length, K], or None.
        router_logits: [sequences, length, layers * experts] float32, or None.
    """

    input_ids: Tensor
    num_tokens: Tensor
    top: TopK | None = None
    router_logits: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """[sequences, length] true on tokens, false on padding."""
        return torch.arange(self.input_ids.shape[1]) < self.num_tokens[:, None]


class TargetSet:
    """A target set on disk. Parquet files are opened when first needed and kept, a few at a time."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._table = lru_cache(maxsize=64)(self._load)

    @classmethod
    def open(cls, directory: Path) -> TargetSet:
        """Open a complete target set, checking that every file is there with the recorded size.

        Raises:
            ArtefactError: the manifest or a file is missing or of another size.
        """
        manifest = Manifest.load(directory)
        for file in manifest.files:
            path = directory / file.name
            size = path.stat().st_size if path.exists() else -1
            if size != file.bytes:
                found = "is missing" if size < 0 else f"has {size} bytes, not {file.bytes}"
                raise ArtefactError(f"{path} {found}", f"delete {directory} and " + REMAKE)
        return cls(directory, manifest)

    def verify(self) -> None:
        """Compare each file's SHA-256 with the manifest.

        Raises:
            ArtefactError: a file has changed.
        """
        for file in self.manifest.files:
            if sha256_file(self.directory / file.name) != file.sha256:
                raise ArtefactError(f"{self.directory / file.name} does not match its checksum", REMAKE)

    def rows(self, source: str) -> NDArray[np.int64]:
        """[sequences, 2] (file, row) of every sequence of a source, in file order."""
        parts = [
            np.stack([np.full(file.sequences, index), np.arange(file.sequences)], axis=1)
            for index, file in enumerate(self.manifest.files)
            if file.source == source
        ]
        return np.concatenate(parts) if parts else np.zeros((0, 2), dtype=np.int64)

    def count_targets(self, rows: NDArray[np.int64]) -> int:
        """Number of tokens that the sequences at `rows` predict: all but the first of each."""
        return sum(self._table(int(file))["num_tokens"][int(row)].as_py() - 1 for file, row in rows)

    def read(self, rows: NDArray[np.int64]) -> TargetBatch:
        """Read the sequences at `rows` [n, 2], in that order; all must be of one source."""
        slices = [self._table(int(file)).slice(int(row), 1) for file, row in rows]
        table = pa.concat_tables(slices)
        length = self.manifest.sequence_length
        return TargetBatch(
            input_ids=_tensor(table, "input_ids", (length,)).long(),
            num_tokens=torch.from_numpy(np.array(table["num_tokens"])).long(),
            top=self._top(table, length),
            router_logits=_optional(table, "router_logits", (length, -1)),
        )

    def _top(self, table: pa.Table, length: int) -> TopK | None:
        ids = _optional(table, "top_ids", (length, -1))
        if ids is None:
            return None
        log_probs = _tensor(table, "top_log_probs", (length, -1)).float()
        return TopK(ids.long(), log_probs, _tensor(table, "tail_log_prob", (length,)))

    def _load(self, file: int) -> pa.Table:
        return read_table(self.directory / self.manifest.files[file].name)


def _tensor(table: pa.Table, name: str, shape: Sequence[int]) -> Tensor:
    values = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(np.array(values)).reshape(len(table), *shape)


def _optional(table: pa.Table, name: str, shape: Sequence[int]) -> Tensor | None:
    empty = len(table[name].combine_chunks().flatten()) == 0
    return None if empty else _tensor(table, name, shape)
