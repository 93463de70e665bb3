"""Reading a target set: any of its sequences, by number, with what the teacher said, as tensors."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_ray.console import progress
from nexus_ray.errors import ArtefactError
from nexus_ray.storage import Place
from nexus_ray.targets.checksums import BLOCK_BYTES
from nexus_ray.targets.format import MANIFEST, REMAKE, Manifest
from nexus_ray.targets.reading.cache import TableCache
from nexus_ray.targets.reading.decoding import StoredRow, output_of, router_of, tokens_of
from nexus_ray.targets.reading.shards import Shard
from nexus_ray.targets.reading.target_directory import TargetDirectory
from nexus_ray.targets.teacher import OutputTargets, RouterTargets

CACHE_BYTES = 256 << 20  # of row groups that a set keeps in memory
AT_ONCE = 32  # shards that are counted at the same time where each is a request to a store
_OPEN_SHARDS = 64  # whose footers a set keeps in memory
_IDENTITY = 12  # digits of a digest that tell two apart in a message

Sequences = NDArray[np.int64]


@dataclass(frozen=True)
class TargetBatch:
    """Sequences of one source with what the teacher said about them.

    Attributes:
        input_ids: [sequences, length] int64, padded at the end with the separator.
        num_tokens: [sequences] int64, tokens before the padding.
        loss_mask: [sequences, length] true where a token is predicted and counts; never the first of a sequence.
        output: teacher's distributions at the positions before those tokens, sequence after sequence; or None.
        router: of the positions that are stored, sequence after sequence; or None.
    """

    input_ids: Tensor
    num_tokens: Tensor
    loss_mask: Tensor
    output: OutputTargets | None = None
    router: RouterTargets | None = None

    @property
    def valid(self) -> Tensor:
        """[sequences, length] true on tokens, false on padding."""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device) < self.num_tokens[:, None]

    def to(self, device: torch.device) -> TargetBatch:
        """The same on `device`."""
        return TargetBatch(
            self.input_ids.to(device),
            self.num_tokens.to(device),
            self.loss_mask.to(device),
            self.output.to(device) if self.output else None,
            self.router.to(device) if self.router else None,
        )


class TargetSet:
    """A target set, whose sequences have numbers in the order of the manifest's files.

    Threads may share it. Every block of a file is compared with its checksum once, when it is first read.
    """

    def __init__(self, place: TargetDirectory, manifest: Manifest) -> None:
        self.place = place
        self.manifest = manifest
        self._shards = [Shard(place, manifest, file) for file in manifest.files]
        self._starts = np.cumsum([0, *(file.sequences for file in manifest.files)], dtype=np.int64)
        self._row_groups: TableCache[tuple[int, int, bool]] = TableCache(CACHE_BYTES)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._lock = threading.RLock()
        self._map: Callable[..., Iterable[None]] = ThreadPoolExecutor(AT_ONCE).map if place.is_remote else map

    @classmethod
    def open(
        cls, location: Place | str, base_fingerprint: str | None = None, tokenizer_sha256: str | None = None
    ) -> TargetSet:
        """Open a complete target set, checking that every file is there with the recorded size.

        Args:
            location: its directory, or a URI that fsspec opens.
            base_fingerprint: of the model that the targets must be of, where they are of one.
            tokenizer_sha256: of the tokenizer that the token ids must be of.

        Raises:
            ArtefactError: the manifest or a file is missing, damaged, of another size or of another run; or the set
                is of another base model or tokenizer.
            StorageError: the file system refused.
        """
        place = TargetDirectory(location)
        targets = cls(place, _read_manifest(place))
        made_with = targets.manifest.base_fingerprint
        if made_with is not None:
            _check_identity(place, "base model", made_with, base_fingerprint)
        _check_identity(place, "tokenizer", targets.manifest.tokenizer_sha256, tokenizer_sha256)
        listed = place.sizes()
        for shard in targets._shards:
            shard.check_listed(listed)
        return targets

    @property
    def shards(self) -> Sequence[Shard]:
        """The files, in the manifest's order."""
        return tuple(self._shards)

    def verify(self) -> None:
        """Compare every byte of every file with its checksums, block by block.

        Raises:
            ArtefactError: a file has changed; it names the first block that has.
            StorageError: a file cannot be read.
        """
        total = sum(-(-file.bytes // BLOCK_BYTES) for file in self.manifest.files)
        with progress(f"check blocks of {BLOCK_BYTES >> 10} KiB", total) as advance:
            for shard in self._shards:
                shard.content.verify(shard.file.sha256, lambda _: advance(1))

    def sequences(self, source: str) -> Sequences:
        """Numbers of all sequences of a source, ascending; none of a source that the set does not hold."""
        files = enumerate(self.manifest.files)
        ranges = [
            np.arange(self._starts[i], self._starts[i + 1], dtype=np.int64) for i, f in files if f.source == source
        ]
        return np.concatenate([np.zeros(0, dtype=np.int64), *ranges])

    def num_tokens(self, sequences: Sequences) -> NDArray[np.int64]:
        """[n] tokens of each sequence, without padding."""
        return self._counts(sequences)[:, 0]

    def num_targets(self, sequences: Sequences) -> NDArray[np.int64]:
        """[n] tokens of each sequence that are in the loss mask."""
        return self._counts(sequences)[:, 1]

    def num_router_positions(self, sequences: Sequences) -> NDArray[np.int64]:
        """[n] positions of each sequence whose routers are stored."""
        router, files = self.manifest.router, self._files(sequences)
        stored = np.asarray([file.router for file in self.manifest.files], dtype=bool)[files]
        return np.where(stored, -(-self.num_tokens(sequences) // router.every), 0) if router else np.zeros_like(files)

    def read(self, sequences: Sequences, *, teacher: bool = True) -> TargetBatch:
        """The sequences with these numbers, in this order; all of one source.

        Args:
            sequences: [n] at least one number; a number may come twice.
            teacher: False reads and decodes no targets.

        Raises:
            ArtefactError: what is read is damaged.
            StorageError: it cannot be read.
            ValueError: there is no such sequence, or only some of them have targets.
        """
        files = [self.manifest.files[index] for index in np.unique(self._files(sequences))]
        if len({(file.output, file.router) for file in files}) != 1:
            raise ValueError(f"read sequences of one source at a time, not of {[file.source for file in files]}")
        rows = [self._row(int(number), teacher) for number in sequences]
        tokens = tokens_of(rows, self.manifest.sequence_length, self.manifest.separator)
        file, output, router = files[0], self.manifest.output, self.manifest.router
        return TargetBatch(
            *tokens,
            output_of(rows, output) if output and file.output and teacher else None,
            router_of(rows, router) if router and file.router and teacher else None,
        )

    def _row(self, number: int, teacher: bool) -> StoredRow:
        index = int(self._files(np.asarray([number]))[0])
        with self._lock:
            shard = self._use(index)
            group, row = shard.place_of(number - int(self._starts[index]))
            key = (index, group, teacher)
            table = self._row_groups.get(key, lambda: shard.read(group, teacher=teacher))
        return StoredRow(shard.path, table, row)

    def _counts(self, sequences: Sequences) -> NDArray[np.int64]:
        """[n, 2] tokens and targets; storage that answers late is asked for several shards at once."""
        files = self._files(sequences)
        counts = np.zeros((len(sequences), 2), dtype=np.int64)

        def count(shard: Shard, index: int) -> None:
            chosen = files == index
            counts[chosen] = shard.counts(sequences[chosen] - self._starts[index])

        needed, size = np.unique(files).tolist(), min(AT_ONCE, _OPEN_SHARDS)
        for start in range(0, len(needed), size):
            indices = needed[start : start + size]
            with self._lock:  # also for the threads that count: each has a shard of its own
                shards = [self._use(index) for index in indices]
                deque(self._map(count, shards, indices), maxlen=0)
        return counts

    def _files(self, sequences: Sequences) -> NDArray[np.int64]:
        """[n] numbers of the files that hold the sequences."""
        if len(sequences) and (sequences.min() < 0 or sequences.max() >= self._starts[-1]):
            raise ValueError(f"{self.place} has sequences 0 to {self._starts[-1] - 1}, not {sequences.tolist()}")
        return np.searchsorted(self._starts, sequences, side="right") - 1

    def _use(self, index: int) -> Shard:
        self._open[index] = self._shards[index]
        self._open.move_to_end(index)
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()
        return self._shards[index]


def _read_manifest(place: TargetDirectory) -> Manifest:
    size, path = place.size(MANIFEST), place.path(MANIFEST)
    if size is None:
        raise ArtefactError(f"no target manifest at {path}", REMAKE)
    try:
        values = json.loads(place.read(MANIFEST, 0, size))
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is not JSON: {error}", REMAKE) from error
    return Manifest.parse(values, path)


def _check_identity(place: TargetDirectory, what: str, found: str, wanted: str | None) -> None:
    if wanted is not None and found != wanted:
        raise ArtefactError(
            f"{place} was made with the {what} {found[:_IDENTITY]}, not {wanted[:_IDENTITY]}",
            f"set model.path to the model it was made with, or {REMAKE}",
        )
