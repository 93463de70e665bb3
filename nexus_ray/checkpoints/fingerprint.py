"""Identity of a base model, cheap enough to compute at every start.

The fingerprint covers the configuration, the name, shape and type of every tensor, and the first kilobytes of each
tensor: models of one architecture have equal headers, so the headers alone would not tell a fine-tuned model
from its origin.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from nexus_ray.checkpoints.reader import CheckpointReader, read_model_config
from nexus_ray.errors import ModelError

_SAMPLE_BYTES = 4096
_VOLATILE = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")
_HEADER_LENGTH_BYTES = 8


def fingerprint(directory: Path) -> str:
    """Hexadecimal SHA-256 that identifies the model in `directory`; equal for copies of it.

    Raises:
        ModelError: the model is missing or damaged.
    """
    config = {key: value for key, value in read_model_config(directory).items() if key not in _VOLATILE}
    hasher = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with CheckpointReader(directory) as reader:
        for shard in reader.shards:
            _add_shard(hasher, shard)
    return hasher.hexdigest()


def _add_shard(hasher: hashlib._Hash, shard: Path) -> None:
    """Header entries in name order, each with a sample of the tensor's bytes."""
    if not shard.exists():
        raise ModelError(f"{shard} is missing, but the checkpoint's index names it", "download the model again")
    size = shard.stat().st_size
    with shard.open("rb") as file:
        header_length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
        if header_length > size:
            raise ModelError(f"{shard} is damaged: its header is longer than the file", "download the model again")
        header = json.loads(file.read(header_length))
        header.pop("__metadata__", None)
        for name in sorted(header):
            start, stop = header[name]["data_offsets"]
            if _HEADER_LENGTH_BYTES + header_length + stop > size:
                raise ModelError(f"{shard} is cut off: {name} ends past the end", "download the model again")
            hasher.update(json.dumps([name, header[name]["dtype"], header[name]["shape"]]).encode())
            file.seek(_HEADER_LENGTH_BYTES + header_length + start)
            hasher.update(file.read(min(_SAMPLE_BYTES, stop - start)))
