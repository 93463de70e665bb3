"""Artefacts appear complete or not at all, and a refusing file system gives an error that says what to do."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from nexus_ray.errors import ArtefactError, StorageError
from nexus_ray.storage import (
    atomic_directory,
    atomic_file,
    digest,
    make_directory,
    read_json,
    sha256_file,
    write_json,
    write_text,
)


def failing(code: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def write_file(path: Path, content: str, then: BaseException | None = None) -> None:
    """Write a file through `atomic_file`, failing halfway with `then`."""
    with atomic_file(path) as temporary:
        temporary.write_text(content)
        if then:
            raise then


def write_directory(path: Path, content: str, then: BaseException | None = None) -> None:
    """Write a directory of one file through `atomic_directory`, failing halfway with `then`."""
    with atomic_directory(path) as temporary:
        (temporary / "file").write_text(content)
        if then:
            raise then


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


class TestAtomicFile:
    def test_nothing_is_there_before_the_block_ends(self, tmp_path):
        path = tmp_path / "a" / "b.txt"
        with atomic_file(path) as temporary:
            temporary.write_text("new")
            assert not path.exists()
            assert temporary.parent == path.parent, "a rename is atomic on one file system only"
        assert path.read_text() == "new"
        assert names(path.parent) == {"b.txt"}

    def test_an_exception_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text("old")
        with pytest.raises(ZeroDivisionError):
            write_file(path, "half", then=ZeroDivisionError())
        assert path.read_text() == "old"
        assert names(tmp_path) == {"a.txt"}

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_a_stop_leaves_no_temporary(self, tmp_path, error):
        with pytest.raises(error):
            write_file(tmp_path / "a.txt", "half", then=error())
        assert names(tmp_path) == set()

    def test_a_full_disk_leaves_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a.txt"
        path.write_text("old")
        monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(StorageError, match="disk is full") as caught:
            write_text(path, "new")
        assert str(path) in caught.value.message
        assert "free some space" in (caught.value.hint or "")
        assert path.read_text() == "old"
        assert names(tmp_path) == {"a.txt"}

    def test_a_full_disk_while_the_block_writes(self, tmp_path):
        with pytest.raises(StorageError, match="disk is full"):
            write_file(tmp_path / "a.bin", "half", then=OSError(errno.ENOSPC, "No space left on device"))
        assert names(tmp_path) == set()

    @pytest.mark.parametrize(
        ("code", "said"),
        [
            (errno.EROFS, "read-only"),
            (errno.EACCES, "permission denied"),
            (errno.EDQUOT, "quota"),
            (errno.EIO, os.strerror(errno.EIO)),
        ],
    )
    def test_a_refusing_directory(self, tmp_path, monkeypatch, code, said):
        monkeypatch.setattr(Path, "write_text", failing(code))
        with pytest.raises(StorageError, match=said) as caught:
            write_json(tmp_path / "a.json", {})
        assert caught.value.hint

    def test_a_file_stands_where_a_directory_is_needed(self, tmp_path):
        (tmp_path / "a").write_text("")
        with pytest.raises(StorageError, match="file"):
            write_text(tmp_path / "a" / "b.txt", "x")
        with pytest.raises(StorageError, match="file"):
            make_directory(tmp_path / "a")


class TestAtomicDirectory:
    def test_it_takes_the_place_of_the_old_one(self, tmp_path):
        path = tmp_path / "d"
        for content in ("old", "new"):
            with atomic_directory(path) as temporary:
                (temporary / content).mkdir()
                (temporary / content / "file").write_text(content)
        assert names(path) == {"new"}, "files of the old one must not stay"
        assert names(tmp_path) == {"d"}

    def test_an_exception_leaves_the_old_one(self, tmp_path):
        path = tmp_path / "d"
        write_directory(path, "old")
        with pytest.raises(ZeroDivisionError):
            write_directory(path, "half", then=ZeroDivisionError())
        assert (path / "file").read_text() == "old"
        assert names(tmp_path) == {"d"}

    def test_a_full_disk_leaves_the_old_one(self, tmp_path, monkeypatch):
        path = tmp_path / "d"
        write_directory(path, "old")
        monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(StorageError, match="disk is full"):
            write_directory(path, "new")
        assert (path / "file").read_text() == "old"
        assert names(tmp_path) == {"d"}

    def test_a_refused_rename_puts_the_old_one_back(self, tmp_path, monkeypatch):
        path = tmp_path / "d"
        write_directory(path, "old")
        rename = Path.rename

        def refuse_the_new_one(self: Path, target: Path) -> Path:
            if Path(target) == path and (self / "file").read_text() == "new":
                raise OSError(errno.EACCES, "refused")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refuse_the_new_one)
        with pytest.raises(StorageError, match="permission denied"):
            write_directory(path, "new")
        assert (path / "file").read_text() == "old"
        assert names(tmp_path) == {"d"}


class TestJson:
    def test_round_trip(self, tmp_path):
        value = {"a": [1, 2.5, None, True], "b": {"ü": "é\n"}}
        write_json(tmp_path / "a.json", value)
        assert read_json(tmp_path / "a.json", what="thing", hint="make it") == value

    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_numbers_that_json_lacks_are_refused(self, tmp_path, number):
        with pytest.raises(ValueError, match="JSON"):
            write_json(tmp_path / "a.json", {"loss": number})
        assert names(tmp_path) == set()

    def test_a_missing_artefact_says_how_to_make_it(self, tmp_path):
        with pytest.raises(ArtefactError, match="no router statistics") as caught:
            read_json(tmp_path / "a.json", what="router statistics", hint="run collect")
        assert caught.value.hint == "run collect"

    @pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe"])
    def test_a_damaged_artefact(self, tmp_path, content):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ArtefactError, match=r"a\.json cannot be read"):
            read_json(tmp_path / "a.json", what="thing", hint="make it")

    def test_digest_ignores_the_order_of_keys_only(self):
        assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        assert digest([1, 2]) != digest([2, 1])
        assert digest({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()


def test_sha256_of_a_file(tmp_path):
    content = os.urandom(3_000_000)
    (tmp_path / "a.bin").write_bytes(content)
    assert sha256_file(tmp_path / "a.bin") == hashlib.sha256(content).hexdigest()
