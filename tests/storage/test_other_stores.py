"""Stores of other protocols, through what fsspec gives for all of them: here the one that it keeps in memory."""

from __future__ import annotations

import uuid

import pytest

from nexus_ray.storage import (
    Place,
    atomic_directory,
    atomic_file,
    exists,
    local_directory,
    local_file,
    place_of,
    read_bytes,
    remove,
    write_text,
)
from nexus_ray.storage.lease import HeldError, Lease
from nexus_ray.storage.objects import create_object


@pytest.fixture
def memory(tmp_path, monkeypatch) -> Place:
    monkeypatch.setenv("NEXUS_RAY_CACHE", str(tmp_path))
    return place_of(f"memory://{uuid.uuid4().hex}/run")


def test_files_and_directories_come_back_and_go_away(memory):
    with atomic_file(memory / "a") as temporary:
        temporary.write_text("0123")
    assert (read_bytes(memory / "a", 1, 3), local_file(memory / "a").read_text()) == (b"12", "0123")
    for text in ("old", "new"):
        with atomic_directory(memory / "d") as temporary:
            (temporary / "file").write_text(text)
        assert (local_directory(memory / "d") / "file").read_text() == text
    remove(memory)
    assert not any(exists(memory / name) for name in ("a", "d"))


def test_an_object_is_created_once(memory):
    create_object(memory / "a", b"1")
    with pytest.raises(FileExistsError):
        create_object(memory / "a", b"2")


def test_without_conditions_the_lease_is_kept_and_followed(memory):
    lock = memory / ".lock"
    first = Lease(lock, {"host": "a"}, sleep=lambda _: None)
    first.acquire()
    with pytest.raises(HeldError):
        Lease(lock, {"host": "b"}, sleep=lambda _: first.renew()).acquire()
    first.release()
    write_text(lock, '{"token": "gone", "count": 3, "holder": {}}')
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    second = Lease(lock, {"host": "b"}, clock=lambda: now[0], sleep=sleep)
    second.acquire()
    second.check()
