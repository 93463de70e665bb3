"""Base models on this node's disk: a remote one is fetched once, by one process, and checked whenever it is opened.

An entry belongs to one state of a model: its URI and the names, sizes and versions of its files. What changes under a
URI is another entry. Files are whole or not there: each is fetched under another name, hashed, compared with what the
store says about it, and renamed. When an entry is opened its files must look as they did when they were last hashed
(size, modification time, inode, the machine not restarted since); else they are hashed again, and what has other bytes
is fetched again.
"""

from __future__ import annotations

import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from upath import UPath

from nexus_ray.checkpoints.cache_entry import CachedFile, Entry, cache_error, entries, looks_of
from nexus_ray.checkpoints.fetching import Hashes, bytes_left, fetch, hash_file, journal_of
from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.remote_model import Checksums, StoredFile, list_model, model_name, store_checksums
from nexus_ray.console import log_in_workers, progress
from nexus_ray.errors import ModelError, StorageError
from nexus_ray.storage import Place, digest, is_remote, sha256_file
from nexus_ray.storage.cache_root import VARIABLE, cache_root

logger = logging.getLogger(__name__)
_SPARE_BYTES = 64 * 2**20  # of the disk, that a fetch leaves free
_SPARE_SHARE = 0.05  # of what is fetched
_WAITING_SECONDS = 15.0  # between two lines of a process that waits for another
_HASHERS = 4
_MB = 1_000_000
_DESCRIBES = "-description"  # ends the names of entries without weights


def local_model(place: Place) -> Path:
    """A local directory with a model's description and weights; a remote one is fetched if this node does not have it.

    Raises:
        ModelError: there is no model, it is damaged, or it changed while it was fetched.
        StorageError: the store failed for minutes, or the disk is too small.
    """
    return _opened(place, weights=True) if is_remote(place) else Path(str(place))


def local_description(place: Place) -> Path:
    """A local directory with a model's configuration and tokenizer, without weights where it is remote.

    Raises:
        ModelError: there is no model, or it changed while it was fetched.
        StorageError: the store failed for minutes, or the disk is too small.
    """
    return _opened(place, weights=False) if is_remote(place) else Path(str(place))


def entry_of(place: UPath, files: Sequence[StoredFile], *, weights: bool) -> Entry:
    """The entry of a remote model in its present state."""
    identity = {"source": str(place), "files": [[file.name, file.size, file.version] for file in files]}
    if any(file.version is None for file in files) and weights:
        identity["fingerprint"] = fingerprint(place)  # the store has no versions: samples of the bytes
    return Entry(f"{model_name(place)}-{digest(identity)[:12]}{'' if weights else _DESCRIBES}")


def missing_bytes(place: UPath) -> int:
    """Bytes that this node would fetch to have the whole model."""
    files = list_model(place, weights=True)
    entry = entry_of(place, files, weights=True)
    known = entry.read()
    return sum(_bytes_left(entry, file) for file in files if file.name not in known)


def _opened(place: UPath, *, weights: bool) -> Path:
    files = list_model(place, weights=weights)
    entry = entry_of(place, files, weights=weights)
    what = "base model" if weights else "tokenizer of the base model"
    try:
        entry.hold()
        with _alone(entry, place, files, what):
            entry.create()
            _repair(entry, place, files, what)
            entry.touch()
    except OSError as error:
        raise cache_error(error) from error
    return entry.files


@contextmanager
def _alone(entry: Entry, place: UPath, files: Sequence[StoredFile], what: str) -> Iterator[None]:
    """Hold an entry's lock; a line now and then says what this process waits for."""
    lock, total = FileLock(entry.fetching), sum(file.size for file in files)
    while True:
        try:
            lock.acquire(timeout=_WAITING_SECONDS)
            break
        except Timeout:
            log_in_workers()
            of = f"{entry.disk_bytes / 1e9:,.1f} of {total / 1e9:,.1f} GB"
            logger.info(
                "waiting for another process of this node that fetches or checks the %s %s: %s", what, place, of
            )
    try:
        yield
    finally:
        lock.release()


def _repair(entry: Entry, place: UPath, files: Sequence[StoredFile], what: str) -> None:
    """Fetch what is missing or has other bytes than when it was fetched."""
    known = _checked(entry, {file.name: file for file in files})
    missing = [file for file in files if file.name not in known]
    record = partial(entry.write, str(place), sum(file.size for file in files))
    if missing:
        if not known:
            _say_if_changed(entry, place)
        _check_space(entry, place, missing)
        record(known)

        def keep(file: StoredFile, cached: CachedFile) -> None:
            known[file.name] = cached
            record(known)

        _fetch_all(entry, place, missing, what, keep)
        weights = not entry.name.endswith(_DESCRIBES)
        if entry_of(place, list_model(place, weights=weights), weights=weights).name != entry.name:
            record({name: cached for name, cached in known.items() if name not in {file.name for file in missing}})
            raise ModelError(f"{place} changed while it was fetched", "run the same command again when it is uploaded")
    elif known != entry.read():
        record(known)


def _checked(entry: Entry, files: dict[str, StoredFile]) -> dict[str, CachedFile]:
    """The files that are what they were when they were fetched; the others are removed, with a warning."""
    known = {name: file for name, file in entry.read().items() if name in files and (entry.files / name).is_file()}
    changed = [name for name, file in known.items() if looks_of(entry.files / name) != file.looks]
    if sum(known[name].size for name in changed) > 1e9:
        log_in_workers()
        logger.info("checking every byte of %s: this node was restarted since, or files have changed", entry.files)
    with ThreadPoolExecutor(_HASHERS) as pool:
        for name, found in zip(changed, pool.map(partial(_content, entry), changed), strict=True):
            if found.sha256 == known[name].sha256:
                known[name] = found
            else:
                logger.warning(
                    "%s is corrupt: its SHA-256 is %s..., was %s... when it was fetched; it is fetched again",
                    entry.files / name, found.sha256[:12], known[name].sha256[:12],
                )  # fmt: skip
                (entry.files / name).unlink()
                del known[name]
    return known


def _content(entry: Entry, name: str) -> CachedFile:
    path = entry.files / name
    looks = looks_of(path)  # before it is read: what is written meanwhile shows the next time
    return CachedFile(path.stat().st_size, sha256_file(path), looks)


def _fetch_all(
    entry: Entry,
    place: UPath,
    files: Sequence[StoredFile],
    what: str,
    keep: Callable[[StoredFile, CachedFile], None],
) -> None:
    """Fetch files one after the other; each is hashed, and kept, in a thread while the next one arrives."""

    def accept(file: StoredFile) -> None:
        keep(file, _accept(entry, place / file.name, file))

    left, whole = sum(_bytes_left(entry, file) for file in files), sum(file.size for file in files)
    if whole > _MB:
        log_in_workers()
        logger.info(
            "fetching the %s %s: %.1f of %.1f GB, into %s", what, place, left / 1e9, whole / 1e9, entry.directory
        )
    arrived: deque[Future[None]] = deque()
    with progress(f"fetching {what} (MB)", left // _MB, "MB") as advance, ThreadPoolExecutor(1) as hasher:
        count = _in_megabytes(advance)
        for file in files:
            fetch(place / file.name, file, entry.partial / file.name, count)
            arrived.append(hasher.submit(accept, file))
            while arrived and arrived[0].done():
                arrived.popleft().result()
        for accepted in arrived:
            accepted.result()


def _accept(entry: Entry, source: UPath, file: StoredFile) -> CachedFile:
    """Give a fetched file its name, once its bytes are what the store says.

    An ETag that looks like an MD5 need not be one: two downloads of the same bytes are believed against it.
    """
    arrived, stored = entry.partial / file.name, store_checksums(source)
    found = hash_file(arrived, md5=stored.md5 is not None)
    if not _agree(found, stored):
        logger.warning("%s arrived with other bytes than the store says it has; it is fetched again", source)
        arrived.unlink()
        fetch(source, file, arrived, lambda _: None)
        first, found = found, hash_file(arrived, md5=stored.md5 is not None)
        if not _agree(found, stored):
            if stored.sha256 is not None or found != first:
                arrived.unlink()
                raise StorageError(
                    f"{source} twice arrived with other bytes than the store says it has", "upload the model again"
                )
            logger.warning("%s: its ETag is no MD5 of its bytes, which arrived the same twice", source)
    journal_of(arrived).unlink()
    arrived.replace(entry.files / file.name)
    return CachedFile(file.size, found.sha256, looks_of(entry.files / file.name))


def _agree(found: Hashes, stored: Checksums) -> bool:
    if stored.sha256 is not None:
        return found.sha256 == stored.sha256
    return stored.md5 is None or found.md5 == stored.md5


def _bytes_left(entry: Entry, file: StoredFile) -> int:
    return bytes_left(entry.partial / file.name, file)


def _check_space(entry: Entry, place: UPath, files: Sequence[StoredFile]) -> None:
    needed = sum(_bytes_left(entry, file) for file in files)
    free = shutil.disk_usage(entry.directory).free
    if free < needed + spare_bytes(needed):
        raise StorageError(
            f"cannot fetch {place} into {cache_root()}: it takes {needed / 1e9:,.2f} GB more, of the "
            f"{free / 1e9:,.2f} GB that are free {spare_bytes(needed) / 1e9:,.2f} GB must stay so",
            f"point {VARIABLE} at a larger disk of this node, or make room: `nexus-ray cache` lists what older models "
            "take, `nexus-ray cache clear NAME` removes one",
        )


def spare_bytes(needed: int) -> int:
    """Bytes that stay free when so many are fetched."""
    return max(_SPARE_BYTES, int(needed * _SPARE_SHARE))


def _say_if_changed(entry: Entry, place: UPath) -> None:
    """Say that what this node has of a model is of another state of it."""
    kind = entry.name.endswith(_DESCRIBES)
    for other in entries():
        if other.name != entry.name and other.name.endswith(_DESCRIBES) == kind and other.source == str(place):
            logger.warning(
                "%s has changed since this node fetched it: fetching it again; "
                "`nexus-ray cache clear %s` removes the earlier one (%.2f GB)",
                place, other.name, other.disk_bytes / 1e9,
            )  # fmt: skip


def _in_megabytes(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Count bytes, report whole megabytes."""
    total = 0

    def count(size: int) -> None:
        nonlocal total
        steps = (total + size) // _MB - total // _MB
        total += size
        if steps:
            advance(steps)

    return count
