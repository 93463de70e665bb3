"""What `nexus_ray.storage` promises about object stores, held against an S3 server that fails as stores do."""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys

import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from object_store import BUCKET
from upath import UPath

import nexus_ray.storage.copies as copies_module
import nexus_ray.storage.retries as retries_module
from nexus_ray.errors import ArtefactError, StorageError
from nexus_ray.storage import (
    atomic_directory,
    atomic_file,
    exists,
    local_directory,
    local_file,
    place_of,
    read_bytes,
    read_json,
    read_text,
    remove,
    sha256_file,
    size_of,
    sizes_of,
    write_json,
    write_text,
)
from nexus_ray.storage.scratch import Use, make_way, working_directory


class HubError(OSError):
    """As the Hugging Face client raises it: the answer is an object of httpx."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} for url")
        self.response = type("Response", (), {"status_code": status})()


class TransportError(Exception):
    """As httpx names what does not get through."""


@pytest.mark.parametrize(
    ("error", "does"), [(HubError(503), True), (HubError(429), True), (HubError(403), False), (TransportError(), True)]
)
def test_what_the_client_of_the_hub_raises_passes_where_the_status_does(error, does):
    assert retries_module.passes(error) == does


class StoppedError(Exception):
    """Something that ends a writer."""


def keys(object_store, place) -> set[str]:
    prefix = place.path.removeprefix(f"{BUCKET}/") + "/"
    return {key.removeprefix(prefix) for key in object_store.keys(prefix)}


def write_and_stop(place) -> None:
    with atomic_file(place) as temporary:
        temporary.write_text("new")
        raise StoppedError


def write_large(place) -> None:
    with atomic_file(place) as temporary:
        temporary.write_bytes(bytes(12 << 20))


def write_directory(place, **files: str) -> None:
    with atomic_directory(place) as temporary:
        for name, text in files.items():
            (temporary / name).write_text(text)


def content(place) -> dict[str, str]:
    directory = local_directory(place)
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


class TestSingleObjects:
    def test_what_was_written_is_there_at_once(self, remote):
        write_text(remote / "a", "text")
        assert (exists(remote / "a"), size_of(remote / "a"), read_text(remote / "a")) == (True, 4, "text")
        write_json(remote / "a", {"b": 1})
        assert read_json(remote / "a", what="thing", hint="make it") == {"b": 1}

    def test_ranges_sizes_and_digests_are_those_of_a_local_file(self, remote, tmp_path):
        for place in (remote / "a", tmp_path / "a"):
            write_text(place, "0123456789")
            assert read_bytes(place, 2, 5) == b"234"
            assert read_bytes(place, 8) == b"89"
            assert sizes_of([place, place.with_name("b")]) == [10, None]
        assert sha256_file(remote / "a") == sha256_file(tmp_path / "a")

    def test_what_is_not_there_is_missing_not_waited_for(self, remote, object_store):
        assert not exists(remote / "a")
        assert size_of(remote) is None
        with pytest.raises(FileNotFoundError):
            read_text(remote / "a")
        with pytest.raises(ArtefactError, match=r"no selection at s3://.*/a"):
            read_json(remote / "a", what="selection", hint="run select")

    def test_a_file_appears_when_its_block_ends(self, remote, object_store):
        with atomic_file(remote / "a") as temporary:
            temporary.write_text("new")
            assert not exists(remote / "a")
        assert read_text(remote / "a") == "new"

    def test_a_failed_block_leaves_what_was_there(self, remote, object_store):
        write_text(remote / "a", "old")
        with pytest.raises(StoppedError):
            write_and_stop(remote / "a")
        assert read_text(remote / "a") == "old"
        assert keys(object_store, remote) == {"a"}

    def test_a_large_file_whose_upload_breaks_off_is_not_visible(self, remote, object_store, monkeypatch):
        monkeypatch.setenv(retries_module.DEADLINE_VARIABLE, "1")
        monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *_, **__: 5 << 20)
        parts = iter(range(100))
        with (
            object_store.refusing(lambda request: "partNumber" in request.query and next(parts) > 0),
            pytest.raises(StorageError, match=r"cannot write s3://.*503.*\n.*continues"),
        ):
            write_large(remote / "large")
        assert object_store.failed
        assert not exists(remote / "large")
        assert keys(object_store, remote) == set()

    def test_a_large_upload_whose_last_answer_was_lost_is_done_again(self, remote, object_store, monkeypatch):
        """The store has ended it, and knows it no more: that is not a bucket that is missing."""
        monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *_, **__: 5 << 20)
        ended = []

        def forgotten(request) -> bool:
            if request.method == "POST" and "uploadId" in request.query and not ended:
                ended.append(request)
                s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].multiparts.clear()
                return True
            return False

        with object_store.refusing(forgotten):
            write_large(remote / "large")
        assert ended
        assert size_of(remote / "large") == 12 << 20

    def test_a_bucket_that_is_not_there_is_named(self):
        with pytest.raises(StorageError, match="cannot write s3://nowhere/a: the object store has no such bucket"):
            write_text(place_of("s3://nowhere/a"), "text")


class TestRetries:
    @pytest.mark.parametrize("method", ["HEAD", "GET", "PUT"])
    def test_a_burst_of_503_is_waited_out_with_one_warning(self, remote, object_store, caplog, method):
        write_text(remote / "a", "text")
        does = {"HEAD": lambda: size_of(remote / "a"), "GET": lambda: read_text(remote / "a")}
        with caplog.at_level(logging.WARNING), object_store.refusing_next(12, method):
            does.get(method, lambda: write_text(remote / "a", "other"))()
        assert object_store.failed == 12
        said = [record.message for record in caplog.records if record.name == retries_module.__name__]
        assert len(said) == 1
        assert f"{remote}/a: object store answers 503" in said[0]

    def test_after_the_deadline_the_error_says_where_and_how_to_continue(self, remote, object_store, monkeypatch):
        monkeypatch.setenv(retries_module.DEADLINE_VARIABLE, "1")
        with object_store.refusing(lambda request: True), pytest.raises(StorageError) as caught:
            read_text(remote / "a")
        assert f"{remote}/a" in caught.value.message
        assert "503" in caught.value.message
        assert "same command" in caught.value.hint

    def test_a_server_that_is_not_there_is_waited_for_too(self, monkeypatch):
        monkeypatch.setenv(retries_module.DEADLINE_VARIABLE, "1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        place = UPath("s3://nexus/a", skip_instance_cache=True)
        with pytest.raises(StorageError, match=r"Could not connect.*for \d+ s"):
            read_text(place)

    def test_missing_credentials_are_said_at_once(self, monkeypatch, object_store):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
        with pytest.raises(StorageError, match="no credentials") as caught:
            write_text(UPath("s3://nexus/a", skip_instance_cache=True), "text")
        assert "AWS_ACCESS_KEY_ID" in caught.value.hint


class TestDirectories:
    def test_its_files_come_back_whole(self, remote, object_store):
        with atomic_directory(remote) as temporary:
            (temporary / "a").write_text("1")
            (temporary / "b").mkdir()
            (temporary / "b" / "c").write_text("2")
            assert keys(object_store, remote) == set()
        assert exists(remote)
        assert content(remote) == {"a": "1", "b/c": "2"}

    def test_another_takes_its_place_and_nothing_of_the_old_one_stays(self, remote, object_store):
        write_directory(remote, a="1", b="2")
        write_directory(remote, a="3")
        assert content(remote) == {"a": "3"}
        assert len(keys(object_store, remote)) == 2

    def test_a_writer_that_ends_between_files_and_manifest_changes_nothing(self, remote, object_store, monkeypatch):
        monkeypatch.setenv(retries_module.DEADLINE_VARIABLE, "1")
        write_directory(remote, a="1")
        before = keys(object_store, remote)
        manifest = lambda request: request.method == "PUT" and "published" in request.path  # noqa: E731
        with object_store.refusing(manifest), pytest.raises(StorageError):
            write_directory(remote, a="2", b="2")
        assert len(keys(object_store, remote)) == len(before) + 2, "the files are there, but nothing names them"
        assert content(remote) == {"a": "1"}
        write_directory(remote, a="3")
        assert content(remote) == {"a": "3"}
        assert len(keys(object_store, remote)) == 2, "the next writer removes them"

    def test_files_without_a_manifest_are_no_artefact(self, remote):
        write_text(remote / "generation-1" / "a", "1")
        assert not exists(remote)
        with pytest.raises(FileNotFoundError):
            local_directory(remote)

    def test_a_listing_of_the_past_hides_nothing_and_shows_nothing_old(self, remote, object_store):
        with object_store.stale_listings():
            assert not exists(remote)
            write_directory(remote, a="1")
            assert exists(remote)
            assert content(remote) == {"a": "1"}
            write_directory(remote, a="2")
            assert content(remote) == {"a": "2"}
            remove(remote)
            assert not exists(remote)

    def test_one_that_was_copied_there_by_hand_is_read_as_it_is_listed(self, remote):
        write_text(remote / "overlay_config.json", "{}")
        assert content(remote) == {"overlay_config.json": "{}"}


class TestCopies:
    def test_what_has_not_changed_is_fetched_once(self, remote, object_store):
        write_directory(remote, a="1")
        write_text(remote / "b", "2")
        first = local_directory(remote), local_file(remote / "b")
        object_store.requests.clear()
        assert (local_directory(remote), local_file(remote / "b")) == first
        assert not any("generation" in request.path for request in object_store.requests)
        assert not any(request.method == "GET" and request.path.endswith("/b") for request in object_store.requests)

    def test_what_is_replaced_by_equal_bytes_is_not_fetched_again(self, remote, object_store):
        write_directory(remote, a="1")
        first = local_directory(remote)
        write_directory(remote, a="1")
        assert local_directory(remote) == first

    def test_what_has_changed_is_fetched_again(self, remote):
        for text in ("1", "2"):
            write_text(remote / "b", text)
            assert local_file(remote / "b").read_text() == text
            assert local_file(remote / "b").name == "b"

    def test_a_damaged_copy_is_fetched_again(self, remote, caplog):
        write_directory(remote, a="1")
        copy = local_directory(remote) / "a"
        copy.write_text("")
        assert content(remote) == {"a": "1"}
        assert "is damaged" in caplog.text
        copy.write_text("2")
        copies_module._checked.clear()  # as another process
        assert content(remote) == {"a": "1"}

    def test_a_damaged_download_is_fetched_again(self, remote, monkeypatch, caplog):
        write_directory(remote, a="1234")
        real, calls = copies_module.download, []

        def damaging(place, file):
            real(place, file)
            calls.append(place)
            if len(calls) == 1:
                file.write_text("1x34")

        monkeypatch.setattr(copies_module, "download", damaging)
        assert content(remote) == {"a": "1234"}
        assert len(calls) == 2
        assert "has arrived damaged" in caplog.text

    def test_damage_in_the_store_is_an_error_that_names_the_object(self, remote, object_store):
        write_directory(remote, a="4321")
        (key,) = (key for key in keys(object_store, remote) if key.startswith("generation"))
        write_text(remote / key, "12")
        with pytest.raises(ArtefactError, match=r"generation-\w+/a is damaged: 2 bytes, not 4"):
            local_directory(remote)

    def test_a_directory_replaced_while_it_is_fetched_is_read_as_the_new_one(self, remote, monkeypatch):
        write_directory(remote, a="1", b="1")
        real = copies_module.download

        def late(place, file):
            monkeypatch.setattr(copies_module, "download", real)
            write_directory(remote, a="2", b="2")
            real(place, file)

        monkeypatch.setattr(copies_module, "download", late)
        assert content(remote) == {"a": "2", "b": "2"}

    def test_processes_of_a_node_fetch_it_once_together(self, remote, object_store):
        write_directory(remote, a="together")
        object_store.requests.clear()
        code = f"from nexus_ray.storage import *; print(local_directory(place_of('{remote}')))"
        processes = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
        ]
        found = {process.communicate()[0] for process in processes}
        assert len(found) == 1
        fetched = [r for r in object_store.requests if r.method == "GET" and "generation" in r.path]
        assert len(fetched) == 1

    def test_copies_make_way_for_others_unless_they_are_in_use(self, tmp_path):
        for name in ("old", "used", "new"):
            use = Use(tmp_path / name)
            use.share()
            use.release()
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_bytes(bytes(100))
        os.utime(tmp_path / "used.lock", (1, 1))
        os.utime(tmp_path / "old.lock", (2, 2))
        reader = Use(tmp_path / "used")
        reader._acquire(fcntl.LOCK_SH)
        make_way(tmp_path, limit=250)
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"used", "new"}
        reader.release()

    def test_what_a_killed_process_left_beside_a_copy_counts_and_goes_with_it(self, tmp_path):
        use = Use(tmp_path / "killed")
        use.share()
        use.release()
        (tmp_path / "killed.partial" / "content").mkdir(parents=True)
        (tmp_path / "killed.partial" / "content" / "file").write_bytes(bytes(100))
        (tmp_path / "killed.fetching").touch()
        make_way(tmp_path, limit=10_000)
        assert (tmp_path / "killed.partial").exists(), "it is within the limit"
        make_way(tmp_path, limit=99)
        assert not list(tmp_path.iterdir())

    def test_what_a_killed_process_left_is_removed_by_the_next(self, remote, monkeypatch, tmp_path):
        monkeypatch.setenv("NEXUS_RAY_CACHE", str(tmp_path))
        code = (
            "import os; from nexus_ray.storage.scratch import working_directory as w\n"
            "with w() as d: (d / 'f').write_text('x'); os._exit(9)"
        )
        subprocess.run([sys.executable, "-c", code], check=False)
        assert len(list((tmp_path / "working").iterdir())) == 2
        with working_directory() as directory:
            assert {path.stem for path in (tmp_path / "working").iterdir()} == {directory.name}
