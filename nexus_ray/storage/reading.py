"""Looking at artefacts, reading and removing them, on disks and in object stores alike.

In an object store only exact names are asked for, never a listing: an answer is about now.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from nexus_ray.errors import ArtefactError
from nexus_ray.storage.digests import sha256_of_file
from nexus_ray.storage.files import storage_error
from nexus_ray.storage.objects import listed, object_size, read_object, remove_object, remove_objects
from nexus_ray.storage.places import Place, is_remote
from nexus_ray.storage.published import MANIFEST, is_published, published

Item = TypeVar("Item")
Result = TypeVar("Result")
_AT_ONCE = 16  # requests about different objects
_BLOCK_BYTES = 64 << 20  # of one request when all of an object is read


def exists(place: Place) -> bool:
    """Whether there is a file, an object, a directory, or a directory that `atomic_directory` has published.

    A directory that holds objects of other origin does not exist by itself: an object store knows no directories.

    Raises:
        StorageError: the store refused or failed.
    """
    if not is_remote(place):
        return place.exists()
    return object_size(place) is not None or is_published(place)


def size_of(place: Place) -> int | None:
    """Bytes of a file or object; None where there is none.

    Raises:
        StorageError: the store refused or failed.
    """
    if is_remote(place):
        return object_size(place)
    try:
        status = place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def sizes_of(places: Iterable[Place]) -> list[int | None]:
    """`size_of` each, in this order."""
    return in_parallel(size_of, list(places))


def in_parallel(action: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """What `action` gives for each item, in their order; it waits for storage, so some are done at the same time."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(action, items))


def file_sizes(directory: Place) -> dict[str, int]:
    """{name: bytes} of all files of a directory, those of directories in it with their path; empty where there is none.

    Of a directory that `atomic_directory` published, what its manifest says; of any other in an object store, what a
    listing shows.

    Raises:
        StorageError: the store refused or failed.
    """
    if not is_remote(directory):
        sizes = {path.relative_to(directory).as_posix(): size_of(path) for path in sorted(directory.rglob("*"))}
        return {name: size for name, size in sizes.items() if size is not None}
    manifest = published(directory)
    if manifest is not None:
        return {name: file.bytes for name, file in manifest.files.items()}
    return {name: int(entry["size"]) for name, entry in listed(directory).items() if name}


def member(directory: Place, name: str) -> Place:
    """Where a file of a directory that `atomic_directory` wrote is now, or would be."""
    manifest = published(directory) if is_remote(directory) else None
    return directory / name if manifest is None else directory / manifest.generation / name


def read_bytes(place: Place, start: int | None = None, stop: int | None = None) -> bytes:
    """Bytes [start, stop) of a file or object, fewer where it ends before; all of it by default.

    Raises:
        FileNotFoundError: there is none.
        StorageError: the store refused or failed.
    """
    if is_remote(place):
        return read_object(place, start, stop)
    with place.open("rb") as file:
        file.seek(start or 0)
        return file.read(-1 if stop is None else max(0, stop - (start or 0)))


def read_text(place: Place) -> str:
    """A file or object as text in UTF-8; raises what `read_bytes` raises."""
    return read_bytes(place).decode("utf-8")


def read_json(place: Place, *, what: str, hint: str) -> Any:
    """Read a JSON artefact.

    Args:
        place: the file.
        what: what the file is, for the error message, e.g. "router statistics".
        hint: how to make it.

    Raises:
        ArtefactError: the file is missing or not JSON.
        StorageError: the store refused or failed.
    """
    try:
        return json.loads(read_text(place))
    except FileNotFoundError as error:
        raise ArtefactError(f"no {what} at {place}", hint) from error
    except (ValueError, OSError) as error:
        raise ArtefactError(f"the {what} at {place} cannot be read: {error}", hint) from error


def sha256_file(place: Place) -> str:
    """SHA-256 of a file's bytes, as hexadecimal; raises what `read_bytes` raises."""
    if isinstance(place, Path):
        return sha256_of_file(place)
    sha256, start = hashlib.sha256(), 0
    size = object_size(place)
    if size is None:
        raise FileNotFoundError(str(place))
    while start < size:
        sha256.update(read_object(place, start, min(start + _BLOCK_BYTES, size)))
        start += _BLOCK_BYTES
    return sha256.hexdigest()


def remove(place: Place) -> None:
    """Remove a file, an object, or a directory with all that is in it; nothing where there is none.

    In an object store what makes a directory readable goes first. An object that a listing does not show stays; nothing
    refers to it any more.

    Raises:
        StorageError: the file system or the store refused.
    """
    if is_remote(place):
        remove_object(place / MANIFEST)
        remove_object(place)
        remove_objects(place, (f"{place.path.rstrip('/')}/{name}" for name in listed(place) if name))
        return
    try:
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, place) from error
