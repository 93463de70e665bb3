"""Single objects of a store: existence, size, bytes, upload, removal; each request is tried again while it should be.

What an object store promises is that an exact key read after it was written is there and new. Its listings may lag,
so nothing here decides by one whether something is complete.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from upath import UPath

from nexus_ray.errors import StorageError
from nexus_ray.storage.retries import code_of, for_at_most, retrying, status_of

PRECONDITION_FAILED = 412
_SOON_SECONDS = 30.0
_NO_SUCH_UPLOAD = "NoSuchUpload"
_KEYS_A_REQUEST = 1000  # the most that S3 removes in one


def information(place: UPath) -> dict[str, Any] | None:
    """What the store says about the object at this very key; None where there is none.

    Raises:
        StorageError: it refused or failed.
    """
    try:
        found: dict[str, Any] = retrying(lambda: place.fs.info(place.path), place, "look at")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found if found["type"] != "directory" else None


def object_size(place: UPath) -> int | None:
    """Bytes of an object; None where there is none, or a server that does not say."""
    found = information(place)
    return None if found is None or found["size"] is None else int(found["size"])


def read_object(place: UPath, start: int | None = None, stop: int | None = None) -> bytes:
    """Bytes [start, stop) of an object, fewer where it ends before; all of it by default.

    Raises:
        FileNotFoundError: there is none.
        StorageError: the store refused or failed.
    """
    return bytes(retrying(lambda: place.fs.cat_file(place.path, start=start, end=stop), place, "read"))


def write_object(place: UPath, content: bytes) -> None:
    """Put an object, whole, in one request."""
    retrying(lambda: _inside_bucket(lambda: place.fs.pipe_file(place.path, content), place), place, "write")


def write_object_soon(place: UPath, content: bytes) -> None:
    """The same for what is not worth a long wait: gives up after half a minute."""
    with for_at_most(_SOON_SECONDS):
        write_object(place, content)


def create_object(place: UPath, content: bytes) -> None:
    """Put an object where there is none.

    Raises:
        FileExistsError: there is one.
        StorageError: the store refused or failed.
    """

    def put() -> None:
        try:
            place.fs.pipe_file(place.path, content, mode="create")
        except OSError as error:
            if status_of(error) == PRECONDITION_FAILED:
                raise FileExistsError(str(place)) from error
            raise

    retrying(lambda: _inside_bucket(put, place), place, "write")


def replace_object(place: UPath, content: bytes, version: str | None) -> None:
    """Put an object in the place of the version with this ETag.

    Only S3's protocol takes such a condition through fsspec; elsewhere the object is put whatever is there.

    Raises:
        FileExistsError: there is another version, or none.
        StorageError: the store refused or failed.
    """
    condition = {"IfMatch": version} if version and {"s3", "s3a"} & set(_protocols(place)) else {}

    def put() -> None:
        try:
            place.fs.pipe_file(place.path, content, **condition)
        except FileNotFoundError as error:
            raise FileExistsError(f"{place} is gone") from error
        except OSError as error:
            if status_of(error) == PRECONDITION_FAILED:
                raise FileExistsError(str(place)) from error
            raise

    retrying(put, place, "write")


def upload(file: Path, place: UPath) -> None:
    """Put a file; the object appears when all of it has arrived."""
    action = place.fs.put_file
    retrying(lambda: _inside_bucket(lambda: action(str(file), place.path), place), place, "write")


def download(place: UPath, file: Path) -> None:
    """Copy an object into a file.

    Raises:
        FileNotFoundError: there is none.
        StorageError: the store refused or failed.
    """
    retrying(lambda: place.fs.get_file(place.path, str(file)), place, "read")


def remove_object(place: UPath) -> None:
    """Remove an object, if it is there."""
    with suppress(FileNotFoundError):
        retrying(lambda: place.fs.rm_file(place.path), place, "remove")


def remove_objects(place: UPath, keys: Iterable[str]) -> None:
    """Remove objects of these keys below `place`; some may stay where the store fails for them alone."""
    paths = sorted(keys)
    for start in range(0, len(paths), _KEYS_A_REQUEST):
        with suppress(FileNotFoundError):
            some = paths[start : start + _KEYS_A_REQUEST]
            retrying(lambda some=some: place.fs.rm(some), place, "remove")  # type: ignore[misc]


def listed(place: UPath) -> dict[str, dict[str, Any]]:
    """{path below `place`: what the store says} of the objects that a listing shows, which may be an old one."""

    def find() -> dict[str, dict[str, Any]]:
        place.fs.invalidate_cache(place.path)
        return dict(place.fs.find(place.path, detail=True))

    try:
        found = retrying(find, place, "list")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    prefix = place.path.rstrip("/") + "/"
    below = {name if name.startswith(prefix) else f"/{name}": entry for name, entry in found.items()}
    return {name.removeprefix(prefix): entry for name, entry in below.items() if name.startswith(prefix)}


def _inside_bucket(action: Any, place: UPath) -> None:
    """Put something; what is not found then is the bucket, or an upload in parts whose last answer was lost."""
    try:
        action()
    except FileNotFoundError as error:
        if code_of(error) == _NO_SUCH_UPLOAD:
            raise OSError(errno.EREMOTEIO, "the store has ended the upload") from None
        raise StorageError(
            f"cannot write {place}: the object store has no such bucket ({error})", "create it, or check the URI"
        ) from error


def _protocols(place: UPath) -> tuple[str, ...]:
    found = place.fs.protocol
    return (found,) if isinstance(found, str) else tuple(found)
