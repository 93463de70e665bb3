"""Copies on this node's disk of what libraries open as local files: fetched once, checked, shared by all processes.

A copy is known by its content: by the checksums of a published directory, else by what the store calls a version (its
ETag). So an artefact that is replaced is fetched again and one that is not is fetched once, however often it is opened.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from upath import UPath

from nexus_ray.errors import ArtefactError, StorageError
from nexus_ray.storage.digests import digest, sha256_of_file
from nexus_ray.storage.objects import download, information, listed
from nexus_ray.storage.places import Place, is_remote
from nexus_ray.storage.published import GENERATION, Published, published
from nexus_ray.storage.scratch import Use, disk_error, make_way, room

logger = logging.getLogger(__name__)
_ATTEMPTS = 3  # to fetch a file that arrives damaged, or a directory that is replaced meanwhile
_CONTENT, _SUMS = "content", "sums.json"
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime", "created")

_in_use: dict[str, Use] = {}  # copies that this process has given out
_checked: set[str] = set()  # those of them whose bytes it has compared
_threads = threading.RLock()


def local_file(place: Place) -> Path:
    """A local file with the content of `place`: itself, or this node's copy of the object.

    Raises:
        FileNotFoundError: there is none.
        StorageError: the store or this node's disk refused or failed.
    """
    if not is_remote(place):
        return place
    found = information(place)
    if found is None:
        raise FileNotFoundError(str(place))
    key = digest([str(place), place.name, found["size"], _version(found)])
    return _copy(key, lambda target: _fetch(place, target / place.name, found["size"], None)) / place.name


def local_directory(place: Place) -> Path:
    """A local directory with the content of `place`: itself, or this node's copy of a directory in a store.

    A directory that `atomic_directory` wrote is checked against its checksums. One that was copied there by other means
    is taken as the store lists it.

    Raises:
        FileNotFoundError: there is none.
        ArtefactError: what the store has is not what was published.
        StorageError: the store or this node's disk refused or failed.
    """
    if not is_remote(place):
        return place
    for attempt in range(1, _ATTEMPTS + 1):
        manifest = published(place)
        try:
            return _published_copy(place, manifest) if manifest else _plain_copy(place)
        except FileNotFoundError:
            if manifest is None:
                raise
            if attempt == _ATTEMPTS and published(place) == manifest:
                raise ArtefactError(f"{place}: a file of {manifest.generation} is missing", "make it again") from None
    raise StorageError(f"{place} is replaced again and again while it is read", "wait for the command that writes it")


def _published_copy(place: UPath, manifest: Published) -> Path:
    def fetch(target: Path) -> None:
        for name, file in manifest.files.items():
            _fetch(place / manifest.generation / name, target / name, file.bytes, file.sha256)

    return _copy(digest({name: file.sha256 for name, file in manifest.files.items()}), fetch)


def _plain_copy(place: UPath) -> Path:
    files = {name: entry for name, entry in listed(place).items() if name and not name.startswith(GENERATION)}
    if not files:
        raise FileNotFoundError(str(place))

    def fetch(target: Path) -> None:
        for name, entry in files.items():
            _fetch(place / name, target / name, entry["size"], None)

    return _copy(digest([str(place), {name: [e["size"], _version(e)] for name, e in files.items()}]), fetch)


def _version(entry: Mapping[str, Any]) -> str:
    """What the store calls the version of an object; without a word of it, every read is another version."""
    found = [str(entry[name]) for name in _VERSIONS if entry.get(name)]
    return found[0] if found else uuid.uuid4().hex


def _fetch(place: UPath, target: Path, size: int, sha256: str | None) -> None:
    """Download an object and compare it with what is known of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(_ATTEMPTS):
        download(place, target)
        damage = _damage(target, size, sha256)
        if damage is None:
            return
        logger.warning("%s has arrived damaged (%s): fetching it again", place, damage)
    raise ArtefactError(f"{place} is damaged: {damage}", "make it again, or put back what was published")


def _damage(file: Path, size: int, sha256: str | None) -> str | None:
    found = file.stat().st_size
    if found != size:
        return f"{found:,} bytes, not {size:,}"
    if sha256 is not None and (actual := sha256_of_file(file)) != sha256:
        return f"SHA-256 {actual[:12]}, not {sha256[:12]}"
    return None


def _copy(key: str, fetch: Callable[[Path], None]) -> Path:
    """This node's copy with this key, fetched unless it is there and whole; it stays while this process runs."""
    with _threads:
        parent = room("copies")
        entry = parent / key[:32]
        try:
            if str(entry) not in _in_use:
                use = Use(entry)
                use.share()
                _in_use[str(entry)] = use
            with FileLock(entry.with_name(f"{entry.name}.fetching")):
                if not _is_whole(entry):
                    _fill(entry, fetch)
                    make_way(parent)
        except FileNotFoundError:  # of what is fetched
            raise
        except OSError as error:
            raise disk_error(error, entry) from error
        return entry / _CONTENT


def _fill(entry: Path, fetch: Callable[[Path], None]) -> None:
    """Fetch into a directory beside the entry, then put it in its place."""
    temporary = entry.with_name(f"{entry.name}.partial")
    for path in (temporary, entry):
        shutil.rmtree(path, ignore_errors=True)
    (temporary / _CONTENT).mkdir(parents=True)
    try:
        fetch(temporary / _CONTENT)
        files = [path for path in (temporary / _CONTENT).rglob("*") if path.is_file()]
        sums = {path.relative_to(temporary).as_posix(): [path.stat().st_size, sha256_of_file(path)] for path in files}
        (temporary / _SUMS).write_text(json.dumps(sums), encoding="utf-8")
        temporary.rename(entry)
        _checked.add(str(entry))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_whole(entry: Path) -> bool:
    """Whether a copy is what was fetched: sizes always, checksums once a process."""
    try:
        sums = json.loads((entry / _SUMS).read_text(encoding="utf-8"))
        for name, (size, sha256) in sums.items():
            damage = _damage(entry / name, size, None if str(entry) in _checked else sha256)
            if damage is not None:
                logger.warning("%s, a copy on this node, is damaged (%s): fetching it again", entry / name, damage)
                return False
    except (OSError, ValueError):
        return False
    _checked.add(str(entry))
    return True
