"""A remote base model is fetched once a node and checked when it is opened; what is not right is fetched again."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from checkpoints.counting_store import BUCKET, CountingStore
from checkpoints.fetch_in_child import PIECE_BYTES, fetch_model
from filelock import FileLock
from upath import UPath

from nexus_ray.checkpoints import cache_entry, fetching, node_cache
from nexus_ray.checkpoints.cache_entry import Entry
from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.node_cache import local_description, local_model, missing_bytes
from nexus_ray.errors import ModelError, StorageError
from nexus_ray.storage import place_of, sha256_file

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PIECE_BYTES", PIECE_BYTES)


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.BaseContext:
    """Processes that begin with the cache's code imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nexus_ray.checkpoints.node_cache"])
    return context


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "NEXUS_RAY_"))}


def _hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(directory.iterdir())}


def _entry(directory: Path) -> Entry:
    return Entry(directory.parent.name)


def _flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_a_local_model_stays_where_it_is(micro_model: Path) -> None:
    assert local_model(micro_model) == micro_model
    assert local_description(micro_model) == micro_model


def test_a_remote_model_is_fetched_whole_and_once(store: CountingStore, remote_model: str, micro_model: Path) -> None:
    assert missing_bytes(place_of(remote_model)) == sum(path.stat().st_size for path in micro_model.iterdir())
    store.requests.clear()
    directory = local_model(place_of(remote_model))
    assert _hashes(directory) == _hashes(micro_model)
    assert directory.is_relative_to(os.environ["NEXUS_RAY_CACHE"])
    assert not list(_entry(directory).partial.iterdir())
    assert missing_bytes(place_of(remote_model)) == 0
    store.requests.clear()
    assert local_model(place_of(remote_model)) == directory
    assert store.got(WEIGHTS) < (micro_model / WEIGHTS).stat().st_size / 10  # its header, to know its files


def test_a_description_leaves_the_weights_where_they_are(
    store: CountingStore, remote_model: str, micro_model: Path
) -> None:
    directory = local_description(place_of(remote_model))
    here = _hashes(micro_model)
    del here[WEIGHTS]
    assert _hashes(directory) == here
    assert store.got(WEIGHTS) == 0


def test_other_forms_of_a_model_beside_it_are_not_fetched(store: CountingStore, remote_model: str) -> None:
    for name in ("original/model.safetensors", "extra.safetensors", "README.md", "image.png"):
        store.client().put_object(
            Bucket=BUCKET, Key=f"{place_of(remote_model).path.partition('/')[2]}/{name}", Body=b"x"
        )
    names = {path.name for path in local_model(place_of(remote_model)).iterdir()}
    assert WEIGHTS in names
    assert not names & {"original", "extra.safetensors", "README.md", "image.png"}


def test_processes_of_a_node_fetch_once_together(
    store: CountingStore, remote_model: str, micro_model: Path, processes: multiprocessing.context.BaseContext
) -> None:
    answers = processes.Queue()
    workers = [processes.Process(target=fetch_model, args=(remote_model, _environment(), answers)) for _ in range(3)]
    for worker in workers:
        worker.start()
    directories = {answers.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(directories) == 1
    assert _hashes(Path(directories.pop())) == _hashes(micro_model)
    gets = [one for one in store.requests if one.method == "GET" and one.path.endswith("/tokenizer.json")]
    assert sum(one.answered for one in gets) == (micro_model / "tokenizer.json").stat().st_size


def test_a_process_that_waits_for_another_says_what_for(
    store: CountingStore, remote_model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(node_cache, "_WAITING_SECONDS", 0.1)
    directory = local_model(place_of(remote_model))
    other = FileLock(_entry(directory).fetching, thread_local=False)
    other.acquire()
    threading.Timer(1.0, other.release).start()
    with caplog.at_level(logging.INFO):
        assert local_model(place_of(remote_model)) == directory
    assert (
        f"waiting for another process of this node that fetches or checks the base model {remote_model}" in caplog.text
    )


def test_what_a_killed_process_had_fetched_is_not_fetched_again(
    store: CountingStore, remote_model: str, micro_model: Path, processes: multiprocessing.context.BaseContext
) -> None:
    size = (micro_model / "tokenizer.json").stat().st_size
    reached = threading.Event()
    go_on = threading.Event()
    count = iter(range(1_000_000))

    def gate(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/tokenizer.json") and next(count) >= 10:
            reached.set()
            go_on.wait(60)
            raise ConnectionAbortedError  # who asked is dead by now

    store.gate = gate
    worker = processes.Process(target=fetch_model, args=(remote_model, _environment()))
    worker.start()
    assert reached.wait(60)
    entry = next(Path(os.environ["NEXUS_RAY_CACHE"], "models").glob("micro-*"))
    journal = entry / "partial" / "tokenizer.json.pieces"
    while len(journal.read_text().splitlines()) < 11:  # the first line is its head
        reached.wait(0.05)
    worker.kill()
    worker.join(60)
    go_on.set()
    store.behave()
    assert not (entry / "files" / "tokenizer.json").exists()
    store.requests.clear()
    assert _hashes(local_model(place_of(remote_model))) == _hashes(micro_model)
    assert store.got("/tokenizer.json") == size - 10 * PIECE_BYTES
    assert store.got("/config.json") < 2 * (micro_model / "config.json").stat().st_size + 1


def test_a_partial_file_of_before_a_restart_is_not_trusted(
    store: CountingStore, remote_model: str, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, file = place_of(remote_model), micro_model / "tokenizer.json"
    known = next(one for one in node_cache.list_model(place, weights=False) if one.name == file.name)
    partial = Path(os.environ["NEXUS_RAY_CACHE"]) / "part"
    partial.parent.mkdir()
    fetching.fetch(place / file.name, known, partial, lambda _: None)
    assert fetching.bytes_left(partial, known) == 0
    with fetching.journal_of(partial).open("a") as journal:
        journal.write("7")  # half a line: the process died
    assert fetching.bytes_left(partial, known) == 0
    monkeypatch.setattr(fetching, "boot_id", lambda: "another")
    assert fetching.bytes_left(partial, known) == known.size


def test_a_corrupt_file_is_fetched_again_and_only_that(
    store: CountingStore, remote_model: str, micro_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = local_model(place_of(remote_model))
    _flip(directory / "tokenizer.json", 5000)
    store.requests.clear()
    with caplog.at_level(logging.WARNING):
        local_model(place_of(remote_model))
    assert _hashes(directory) == _hashes(micro_model)
    assert f"{directory / 'tokenizer.json'} is corrupt" in caplog.text
    assert store.got("/tokenizer.json") == (micro_model / "tokenizer.json").stat().st_size
    assert store.got("/tokenizer_config.json") == store.got("/config.json") == 0


def test_a_file_that_was_touched_only_is_hashed_and_kept(
    store: CountingStore, remote_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = local_model(place_of(remote_model))
    (directory / WEIGHTS).touch()
    hashed: list[str] = []
    monkeypatch.setattr(node_cache, "sha256_file", lambda path: (hashed.append(path.name), sha256_file(path))[1])
    store.requests.clear()
    local_model(place_of(remote_model))
    local_model(place_of(remote_model))
    assert hashed == [WEIGHTS]
    assert store.got("/tokenizer.json") == 0


def test_after_a_restart_every_byte_is_checked(
    store: CountingStore, remote_model: str, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what the file system's description does not show."""
    directory = local_model(place_of(remote_model))
    before = (directory / WEIGHTS).stat()
    _flip(directory / WEIGHTS, before.st_size - 9)
    os.utime(directory / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    local_model(place_of(remote_model))
    assert _hashes(directory) != _hashes(micro_model), "bytes are not hashed at each start"
    monkeypatch.setattr(cache_entry, "boot_id", lambda: "another")
    local_model(place_of(remote_model))
    assert _hashes(directory) == _hashes(micro_model)


@pytest.mark.parametrize("harm", ["missing", "cut", "record"])
def test_what_is_lost_is_fetched_again(store: CountingStore, remote_model: str, micro_model: Path, harm: str) -> None:
    directory = local_model(place_of(remote_model))
    if harm == "missing":
        (directory / WEIGHTS).unlink()
    elif harm == "cut":
        os.truncate(directory / WEIGHTS, 1000)
    else:
        (directory.parent / "entry.json").write_text("{")
    assert _hashes(local_model(place_of(remote_model))) == _hashes(micro_model)


def test_a_model_that_changed_under_its_uri_is_fetched_again(
    store: CountingStore, remote_model: str, micro_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A new ETag is enough: sizes are the same."""
    first = local_model(place_of(remote_model))
    other = Path(shutil.copytree(micro_model, tmp_path / "other"))
    _flip(other / WEIGHTS, (other / WEIGHTS).stat().st_size - 5)
    store.put(other, place_of(remote_model).path.partition("/")[2])
    with caplog.at_level(logging.WARNING):
        second = local_model(place_of(remote_model))
    assert first != second
    assert _hashes(first) == _hashes(micro_model)
    assert _hashes(second) == _hashes(other)
    assert "has changed since this node fetched it" in caplog.text
    assert f"nexus-ray cache clear {first.parent.name}" in caplog.text


def test_a_model_that_changes_while_it_is_fetched_is_refused(
    store: CountingStore, remote_model: str, micro_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(*arguments: object) -> object:
        key = f"{place_of(remote_model).path.partition('/')[2]}/generation_config.json"
        store.client().put_object(Bucket=BUCKET, Key=key, Body=b" " * size)
        return accept(*arguments)

    accept, size = node_cache._accept, (micro_model / "generation_config.json").stat().st_size
    monkeypatch.setattr(node_cache, "_accept", change)
    with pytest.raises(ModelError, match="changed while it was fetched"):
        local_model(place_of(remote_model))
    assert not any(entry.read() for entry in cache_entry.entries()), "who knows which state each file is of"


def test_a_file_is_known_to_be_whole_while_the_next_one_arrives(
    store: CountingStore, remote_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill during the next one must not cost it."""
    seen: list[str] = []

    def fetch(source: UPath, *arguments: object) -> None:
        deadline = time.monotonic() + 10
        while seen and seen[-1] not in _known() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert set(seen) <= _known()
        seen.append(source.name)
        real(source, *arguments)  # type: ignore[arg-type]

    real = node_cache.fetch
    monkeypatch.setattr(node_cache, "fetch", fetch)
    local_model(place_of(remote_model))
    assert len(seen) > 2


def _known() -> set[str]:
    return {name for entry in cache_entry.entries() for name in entry.read()}


def test_bytes_that_are_not_what_the_store_says_are_fetched_once_more(
    store: CountingStore, remote_model: str, micro_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged: list[str] = []

    def damage(path: str, content: bytes) -> bytes:
        if path.endswith("/tokenizer.json") and len(content) == PIECE_BYTES and not damaged:
            damaged.append(path)
            return content[:-1] + bytes([content[-1] ^ 1])
        return content

    store.damage = damage
    with caplog.at_level(logging.WARNING):
        directory = local_model(place_of(remote_model))
    assert damaged
    assert "tokenizer.json arrived with other bytes" in caplog.text
    assert _hashes(directory) == _hashes(micro_model)


@pytest.mark.parametrize("sha256", [True, False])
def test_what_always_arrives_otherwise(
    store: CountingStore,
    micro_model: Path,
    request: pytest.FixtureRequest,
    sha256: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A SHA-256 that the store keeps is right; an ETag may be no MD5 at all, so the same bytes twice are believed."""
    arguments = {"ChecksumAlgorithm": "SHA256"} if sha256 else {}
    uri = store.put(micro_model, f"otherwise-{sha256}/micro", **arguments)
    store.damage = lambda path, content: content.upper() if path.endswith("/tokenizer.json") else content
    if sha256:
        with pytest.raises(StorageError, match=r"tokenizer\.json twice arrived with other bytes"):
            local_model(place_of(uri))
    else:
        arrived = local_model(place_of(uri)) / "tokenizer.json"
        assert "its ETag is no MD5" in caplog.text
        assert arrived.read_bytes() == (micro_model / "tokenizer.json").read_bytes().upper()


def test_a_store_that_answers_503_for_a_while_is_waited_for(
    store: CountingStore, remote_model: str, micro_model: Path
) -> None:
    def gate(method: str, path: str) -> None:
        if path.endswith("/tokenizer.json") and method == "GET" and bursts:
            store.failures = bursts.pop()

    bursts = [3, 2, 1]
    store.failures = 2
    store.gate = gate
    assert _hashes(local_model(place_of(remote_model))) == _hashes(micro_model)
    assert not bursts


def test_a_store_that_stays_away_ends_in_words(
    store: CountingStore, remote_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXUS_RAY_STORAGE_DEADLINE", "1")
    store.failures = 1_000_000
    with pytest.raises(StorageError, match=f"cannot list {remote_model}: the object store answered 503"):
        local_model(place_of(remote_model))


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    store: CountingStore, remote_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=65_000_000))
    with pytest.raises(StorageError, match=r"takes 0\.00 GB more, of the 0\.07 GB that are free") as error:
        local_model(place_of(remote_model))
    assert "NEXUS_RAY_CACHE" in str(error.value)
    assert "nexus-ray cache" in str(error.value)
    assert store.got("/tokenizer.json") == 0


def test_a_cache_that_cannot_be_written_to_names_the_variable(
    store: CountingStore, remote_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NEXUS_RAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="environment variable NEXUS_RAY_CACHE"):
        local_model(place_of(remote_model))


def test_there_is_no_model(store: CountingStore) -> None:
    with pytest.raises(ModelError, match=f"no directory at s3://{BUCKET}/nothing"):
        local_model(place_of(f"s3://{BUCKET}/nothing"))


def test_a_shard_that_the_index_names_and_nobody_uploaded(store: CountingStore, remote_model: str) -> None:
    key = place_of(remote_model).path.partition("/")[2]
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    store.client().put_object(Bucket=BUCKET, Key=f"{key}/{WEIGHTS}.index.json", Body=json.dumps(index).encode())
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors is missing"):
        local_model(place_of(remote_model))


@pytest.fixture
def versionless(micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The micro model where the store says nothing but names and sizes."""
    monkeypatch.setenv("NEXUS_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nexus_ray.checkpoints.remote_model._VERSIONS", ())
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(micro_model), "/plain/micro", recursive=True)
    yield "memory://plain/micro"
    filesystem.rm("/plain", recursive=True)


def test_without_versions_samples_of_the_bytes_tell_models_apart(versionless: str, micro_model: Path) -> None:
    first = local_model(place_of(versionless))
    assert _hashes(first) == _hashes(micro_model)
    filesystem = fsspec.filesystem("memory")
    content = bytearray(filesystem.cat_file("/plain/micro/model.safetensors"))
    content[-1] ^= 1  # in the first kilobytes of the last tensor
    filesystem.pipe_file("/plain/micro/model.safetensors", bytes(content))
    assert fingerprint(versionless) != fingerprint(micro_model)
    assert local_model(place_of(versionless)) != first
