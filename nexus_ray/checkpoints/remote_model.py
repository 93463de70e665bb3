"""The files of a remote model: which belong to it, how large they are, and what the store says to tell them apart.

Only files of the directory itself count, and of the weights only those that the checkpoint is made of: hubs keep the
same model in other forms in folders beside it.
"""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from upath import UPath

from nexus_ray.checkpoints.byte_files import remote_info
from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.errors import ModelError, StorageError
from nexus_ray.storage import Place, is_remote
from nexus_ray.storage.retries import retrying

logger = logging.getLogger(__name__)
# Configuration, tokenizer, chat template, index of the weights, licences.
_DESCRIPTION = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "USAGE_POLICY*")
# In the words of s3fs and HTTP, gcsfs and adlfs, the hub; then times, which stores without versions keep at least.
_VERSIONS = ("ETag", "etag", "generation", "blob_id", "mtime", "created", "last_modified", "LastModified")


@dataclass(frozen=True)
class StoredFile:
    """A file of a remote model.

    Attributes:
        name: in its directory.
        size: bytes.
        version: what the store changes with the content; None when it says nothing of the kind.
    """

    name: str
    size: int
    version: str | None


@dataclass(frozen=True)
class Checksums:
    """What a store says that a file's bytes add up to; None for what it does not say.

    Attributes:
        sha256: hexadecimal.
        md5: hexadecimal; that it is one may be a guess.
    """

    sha256: str | None = None
    md5: str | None = None


def model_name(place: Place) -> str:
    """The last part of where a model is, without the revision of a hub."""
    if not is_remote(place):
        return place.resolve().name
    return str(place).rstrip("/").rpartition("/")[2].partition("@")[0]


def list_model(place: UPath, *, weights: bool) -> tuple[StoredFile, ...]:
    """The files of a remote model, sorted by name: those that describe it, and its weights where they are asked for.

    Raises:
        ModelError: there is no model, its index is damaged, or one of its files is missing.
        StorageError: the store refused, or failed for minutes.
    """
    found = _list(place)
    names = {name for name in found if any(fnmatch(name, pattern) for pattern in _DESCRIPTION)}
    if "config.json" not in names:
        raise ModelError(f"model.path: {place} has no config.json", "is it a Hugging Face model directory?")
    if weights:
        with CheckpointReader(place) as reader:
            names |= {shard.name for shard in reader.shards}
    return tuple(_stored(place / name, found.get(name)) for name in sorted(names))


def store_checksums(file: UPath) -> Checksums:
    """What the store says about the bytes of a file, as far as it says something that can be compared."""
    filesystem = file.fs
    if "s3" in _protocols(filesystem):
        return _s3_checksums(file)
    found = _list(file.parent).get(file.name) or {}
    large = found.get("lfs")  # of the hub: its name in git's large file storage is the SHA-256 of its bytes
    sha256 = large.get("sha256") if isinstance(large, dict) else getattr(large, "sha256", None)
    return Checksums(sha256=sha256, md5=_hexadecimal(found.get("md5Hash")))  # the latter of Google's store


def _s3_checksums(file: UPath) -> Checksums:
    """A SHA-256 of the whole object where it was uploaded with one; its ETag where that should be an MD5."""
    bucket, key, _ = file.fs.split_path(file.path)
    ask = {"Bucket": bucket, "Key": key, "ChecksumMode": "ENABLED"}
    try:
        answer: dict[str, Any] = retrying(lambda: file.fs.call_s3("head_object", **ask), file, "look at")
    except (FileNotFoundError, StorageError) as error:
        logger.debug("%s: no checksum: %s", file, error)
        return Checksums()
    whole = answer.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT"
    etag = str(answer.get("ETag", "")).strip('"')
    # Encrypted with a key of one's own, or uploaded in parts ("-N" at the end), an ETag is no MD5 of the content.
    encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    is_md5 = re.fullmatch(r"[0-9a-f]{32}", etag) is not None and not encrypted
    return Checksums(_hexadecimal(answer.get("ChecksumSHA256")) if whole else None, etag if is_md5 else None)


def _list(place: UPath) -> dict[str, dict[str, Any]]:
    """{name: what the store says} of the files of a directory."""

    def ask() -> Iterable[dict[str, Any]]:
        place.fs.invalidate_cache()
        return list(place.fs.ls(place.path, detail=True))

    try:
        entries = retrying(ask, place, "list")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(f"model.path: no directory at {place}", "check the URI, or upload the model") from error
    return {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in entries if entry["type"] == "file"}


def _stored(file: UPath, found: dict[str, Any] | None) -> StoredFile:
    """A file as the listing has it; the store is asked where it is not in it, or its size is not."""
    info = found if found is not None and isinstance(found.get("size"), int) else remote_info(file)
    if info is None:
        raise ModelError(f"{file} is missing", "upload the model again: its index names this file")
    if not isinstance(info.get("size"), int):
        raise ModelError(f"{file} does not say how long it is", "copy the model to a local directory")
    versions = (info.get(key) for key in _VERSIONS)
    version = next((str(version) for version in versions if version), None)
    return StoredFile(file.name, info["size"], version)


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _hexadecimal(checksum: object) -> str | None:
    """A checksum that is written in base 64."""
    return base64.b64decode(checksum).hex() if isinstance(checksum, str) else None
