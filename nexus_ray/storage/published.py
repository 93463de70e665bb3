"""Directories in an object store, which knows no rename: the files go first, a small object that names them last.

    <place>/published.json              {"generation": "generation-3f…", "files": {NAME: {"bytes": …, "sha256": …}}}
    <place>/generation-3f…/NAME

A reader begins at `published.json`, so it sees all files of one generation or all of another. Whatever ends a writer
before that object is replaced leaves the artefact as it was, whole; the next writer removes what was left behind.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from upath import UPath

from nexus_ray.errors import ArtefactError
from nexus_ray.storage.digests import sha256_of_file
from nexus_ray.storage.objects import listed, object_size, read_object, remove_objects, upload, write_object
from nexus_ray.storage.scratch import working_directory

MANIFEST = "published.json"
GENERATION = "generation-"


class StoredFile(BaseModel):
    """A file of a published directory."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class Published(BaseModel):
    """What `published.json` says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["nexus-ray-directory/1"] = "nexus-ray-directory/1"
    generation: str
    files: dict[str, StoredFile]


@contextmanager
def publishing(place: UPath) -> Iterator[Path]:
    """Yield a local directory; its files become the artefact at `place` when the block ends without an exception.

    Raises:
        StorageError: the store refused or failed; what was published before is still there.
    """
    leftovers = {name for name in listed(place) if name.startswith(GENERATION)}
    with working_directory() as temporary:
        yield temporary
        generation = f"{GENERATION}{uuid.uuid4().hex[:12]}"
        files = {}
        for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
            name = file.relative_to(temporary).as_posix()
            upload(file, place / generation / name)
            files[name] = StoredFile(bytes=file.stat().st_size, sha256=sha256_of_file(file))
    before = published(place)
    write_object(place / MANIFEST, Published(generation=generation, files=files).model_dump_json(indent=2).encode())
    named = {f"{before.generation}/{name}" for name in before.files} if before else set()
    remove_objects(place, (f"{place.path.rstrip('/')}/{name}" for name in leftovers | named))


def published(place: UPath) -> Published | None:
    """What is published at `place`; None where nothing is.

    Raises:
        ArtefactError: its manifest is damaged.
        StorageError: the store refused or failed.
    """
    path = place / MANIFEST
    try:
        values = json.loads(read_object(path))
        return Published.model_validate(values)
    except FileNotFoundError:
        return None
    except (ValueError, ValidationError) as error:
        raise ArtefactError(
            f"{path} does not say what is published: {error}", f"remove {place} and make it again"
        ) from error


def is_published(place: UPath) -> bool:
    """Whether a directory is published at `place`."""
    return object_size(place / MANIFEST) is not None
