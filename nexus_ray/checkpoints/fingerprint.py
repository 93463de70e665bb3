"""Identity of a base model: cheap enough to compute at every start, or of every byte on demand.

The fingerprint covers the configuration, the name, shape and type of every tensor, and the first kilobytes of each
tensor: models of one architecture have equal headers, so the headers alone would not tell a fine-tuned model
from its origin.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from torch import Tensor

from nexus_ray.checkpoints.byte_files import ByteFile, RemoteFile, locate, open_file
from nexus_ray.checkpoints.header import TensorEntry, dtype_name, read_header
from nexus_ray.checkpoints.reader import CheckpointReader, read_model_config
from nexus_ray.checkpoints.remote_model import StoredFile, list_model
from nexus_ray.console import progress
from nexus_ray.storage import Place, is_remote

_SAMPLE_BYTES = 4096
_PIECE_BYTES = 16 * 2**20
_CONNECTIONS = 16
_VOLATILE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")
_known: dict[tuple[str, tuple[StoredFile, ...]], str] = {}  # of remote models in their present states


def fingerprint(directory: Place | str) -> str:
    """Hexadecimal SHA-256 that identifies the model in `directory`; equal for copies of it.

    Raises:
        ModelError: the model is missing or damaged.
    """
    place = locate(directory)
    if not is_remote(place):
        return _computed(place)
    # Samples of hundreds of tensors: asked for once while the store says that its files are the same.
    files = list_model(place, weights=True)
    key = (str(place), files) if all(file.version for file in files) else None
    if key is None or key not in _known:
        found = _computed(place)
        if key is None:
            return found
        _known[key] = found
    return _known[key]


def _computed(directory: Place) -> str:
    config = {key: value for key, value in read_model_config(directory).items() if key not in _VOLATILE}
    hasher = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with CheckpointReader(directory) as reader:
        for shard in reader.shards:
            with closing(open_file(shard)) as file:
                _add_samples(hasher, file)
    return hasher.hexdigest()


def full_sha256(directory: Place | str, *, stem: str = "model") -> dict[str, str]:
    """{file name: hexadecimal SHA-256 of all its bytes} of a checkpoint's safetensors files; reads everything.

    Raises:
        ModelError: a file is missing or cannot be read.
    """
    with CheckpointReader(directory, stem=stem) as reader:
        shards = reader.shards
    pieces = 0
    for shard in shards:
        with closing(open_file(shard)) as file:
            pieces += -(-file.size // _PIECE_BYTES)
    hashes = {}
    with progress(f"sha256 ({_PIECE_BYTES // 2**20} MiB each)", pieces) as advance:
        for shard in shards:
            with closing(open_file(shard)) as file:
                hashes[shard.name] = _sha256(file, advance)
    return hashes


def _add_samples(hasher: hashlib._Hash, file: ByteFile) -> None:
    """Header entries in name order, each with a sample of the tensor's bytes."""
    entries = sorted(read_header(file).entries.items())
    samples = _samples(file, [entry for _, entry in entries])
    for (name, entry), sample in zip(entries, samples, strict=True):
        hasher.update(json.dumps([name, dtype_name(entry.dtype), list(entry.shape)]).encode())
        hasher.update(sample.numpy().data)


def _samples(file: ByteFile, entries: Sequence[TensorEntry]) -> Iterable[Tensor]:
    """The first bytes of each tensor; of a remote file many at a time, for each takes a round trip."""

    def read(entry: TensorEntry) -> Tensor:
        return file.read(entry.start, min(entry.start + _SAMPLE_BYTES, entry.stop))

    if not isinstance(file, RemoteFile):
        return map(read, entries)
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(read, entries))


def _sha256(file: ByteFile, advance: Callable[[int], None]) -> str:
    hasher = hashlib.sha256()
    for start in range(0, file.size, _PIECE_BYTES):
        hasher.update(file.read(start, min(start + _PIECE_BYTES, file.size)).numpy().data)
        advance(1)
    return hasher.hexdigest()
