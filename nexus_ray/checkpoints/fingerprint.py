"""Identity of a base model: cheap enough to compute at every start, or of every byte on demand.

The fingerprint covers the configuration, the name, shape and type of every tensor, and the first kilobytes of each
tensor: models of one architecture have equal headers, so the headers alone would not tell a fine-tuned model
from its origin.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import closing

from nexus_ray.checkpoints.byte_files import ByteFile, Location, file_name, open_file
from nexus_ray.checkpoints.header import dtype_name, read_header
from nexus_ray.checkpoints.reader import CheckpointReader, read_model_config
from nexus_ray.console import progress

_SAMPLE_BYTES = 4096
_PIECE_BYTES = 16 * 2**20
_VOLATILE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")


def fingerprint(directory: Location) -> str:
    """Hexadecimal SHA-256 that identifies the model in `directory`; equal for copies of it.

    Raises:
        ModelError: the model is missing or damaged.
    """
    config = {key: value for key, value in read_model_config(directory).items() if key not in _VOLATILE}
    hasher = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with CheckpointReader(directory) as reader:
        for shard in reader.shards:
            with closing(open_file(shard)) as file:
                _add_samples(hasher, file)
    return hasher.hexdigest()


def full_sha256(directory: Location, *, stem: str = "model") -> dict[str, str]:
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
                hashes[file_name(shard)] = _sha256(file, advance)
    return hashes


def _add_samples(hasher: hashlib._Hash, file: ByteFile) -> None:
    """Header entries in name order, each with a sample of the tensor's bytes."""
    for name, entry in sorted(read_header(file).entries.items()):
        hasher.update(json.dumps([name, dtype_name(entry.dtype), list(entry.shape)]).encode())
        hasher.update(file.read(entry.start, min(entry.start + _SAMPLE_BYTES, entry.stop)).numpy().data)


def _sha256(file: ByteFile, advance: Callable[[int], None]) -> str:
    hasher = hashlib.sha256()
    for start in range(0, file.size, _PIECE_BYTES):
        hasher.update(file.read(start, min(start + _PIECE_BYTES, file.size)).numpy().data)
        advance(1)
    return hasher.hexdigest()
