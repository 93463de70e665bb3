"""Training whose run directory is in an object store: the same bytes as on a disk, whatever the store does."""

from __future__ import annotations

import errno
import json
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from object_store import BUCKET, ObjectStore, Request
from regression import STEPS, Regression, events, train
from tensorboardX.proto.event_pb2 import Event
from torch import Tensor

from nexus_ray.errors import StorageError
from nexus_ray.layout import RunLayout
from nexus_ray.storage import Place, local_directory, read_bytes
from nexus_ray.storage.objects import listed
from nexus_ray.storage.published import published
from nexus_ray.training import checkpointing
from nexus_ray.training.loop import run_steps
from nexus_ray.training.recovery import newest, steps_reached
from nexus_ray.training.settings import LoopSettings
from nexus_ray.training.watching import mirrored, stored_lines
from nexus_ray.training.watching.metrics import read_metrics
from nexus_ray.training.watching.mirrored import Mirrored

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.timeout(300)]
Make = Callable[..., LoopSettings]


def key(place: Place) -> str:
    return str(place).removeprefix(f"s3://{BUCKET}/")


def checkpoints(object_store: ObjectStore, settings: LoopSettings) -> set[str]:
    prefix = key(settings.layout.checkpoints) + "/"
    return {name.removeprefix(prefix).split("/")[0] for name in object_store.keys(prefix)} - {"kept.json"}


def stored_records(settings: LoopSettings) -> list[dict[str, Any]]:
    """The metrics in the store, without a request: for use while the store answers another one."""
    body = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].keys[key(settings.layout.metrics)].value
    return [json.loads(line) for line in body.splitlines()]


def told(layout: RunLayout) -> list[tuple[Any, ...]]:
    """What metrics say of steps, validations and the best weights, times aside."""
    kinds = ("step", "validation", "best")
    return [(r["event"], r["step"], r["loss"]) for r in read_metrics(layout.metrics) if r["event"] in kinds]


def assert_ends_alike(found: LoopSettings, expected: LoopSettings) -> None:
    """Final checkpoints, best weights and metrics are the same, byte for byte."""
    for name in ("checkpoints/step-00000012", "best"):
        one, other = (local_directory(made.layout.directory / name) for made in (found, expected))
        assert (one / "state.safetensors").read_bytes() == (other / "state.safetensors").read_bytes()
    assert told(found.layout) == told(expected.layout)


@pytest.fixture
def whole(settings: Make) -> LoopSettings:
    """A training on a disk that nothing disturbed."""
    made = settings("whole")
    train(made)
    return made


class Waiting(Regression):
    """Calls something before each step, on the thread that trains."""

    before: Callable[[int], None] = lambda self, step: None

    def accumulate(self, step: int) -> dict[str, Any]:
        self.before(step)
        return super().accumulate(step)


class TestContinuing:
    @pytest.mark.parametrize("interrupted", [2, 7, 11])
    def test_it_ends_as_one_on_a_disk_wherever_it_was_interrupted(self, stored: Make, whole, interrupted):
        train(stored(), stop_before=interrupted)
        resumed = train(stored())
        assert resumed.taken[0] == interrupted - interrupted % 3, "from the last checkpoint"
        assert_ends_alike(stored(), whole)

    def test_the_newest_few_stay_and_of_each_one_generation(self, stored: Make, object_store: ObjectStore):
        train(stored())
        assert train(stored()).taken == [], "it has ended, and stays ended"
        assert checkpoints(object_store, stored()) == {"step-00000009", "step-00000012"}
        for name in ("checkpoints/step-00000009", "checkpoints/step-00000012", "best"):
            manifest = published(stored().layout.directory / name)
            assert manifest is not None
            expected = {f"{manifest.generation}/{file}" for file in manifest.files} | {"published.json"}
            prefix = key(stored().layout.directory / name) + "/"
            assert {found.removeprefix(prefix) for found in object_store.keys(prefix)} == expected

    def test_a_damaged_checkpoint_is_passed_over_and_named(self, stored: Make, object_store: ObjectStore, whole):
        train(stored(), stop_before=8)
        place = stored().layout.checkpoints / "step-00000006"
        (name,) = (name for name in object_store.keys(key(place)) if name.endswith("state.safetensors"))
        object_store.client().put_object(Bucket=BUCKET, Key=name, Body=b"damaged")
        assert train(stored()).taken[0] == 3
        assert_ends_alike(stored(), whole)
        (warning,) = [record for record in read_metrics(stored().layout.metrics) if record["event"] == "warning"]
        assert str(place) in warning["message"]

    def test_an_upload_that_was_cut_off_is_no_checkpoint_and_is_removed(
        self, stored: Make, object_store: ObjectStore, whole
    ):
        train(stored(), stop_before=5)
        half = stored().layout.checkpoints / "step-00000005" / "generation-0123456789ab" / "state.safetensors"
        object_store.client().put_object(Bucket=BUCKET, Key=key(half), Body=b"half")
        assert steps_reached(stored().layout.checkpoints) == 3
        assert train(stored()).taken[0] == 3
        assert "warning" not in dict(events(stored()))
        assert checkpoints(object_store, stored()) == {"step-00000009", "step-00000012"}
        assert_ends_alike(stored(), whole)


class TestStaleListings:
    @pytest.fixture
    def of_step_3(self, stored: Make, object_store: ObjectStore) -> Any:
        """A run that was stopped after step 8, in a store whose listings show what was there after step 4."""
        train(stored(), stop_before=4)
        with object_store.stale_listings():
            assert steps_reached(stored().layout.checkpoints) == 3
            train(stored(), stop_before=8)
            yield

    def test_they_cost_nothing_while_the_store_tells_what_was_kept(self, of_step_3, stored: Make, whole):
        assert train(stored()).taken[0] == 6
        assert_ends_alike(stored(), whole)

    def test_without_that_they_cost_time_only(self, of_step_3, stored: Make, object_store: ObjectStore, whole):
        object_store.client().delete_object(Bucket=BUCKET, Key=key(stored().layout.checkpoints / "kept.json"))
        assert train(stored()).taken[0] == 3
        assert_ends_alike(stored(), whole)

    def test_what_they_still_show_and_is_gone_is_passed_over(self, stored: Make, object_store: ObjectStore, whole):
        train(stored(), stop_before=8)
        with object_store.stale_listings():
            assert steps_reached(stored().layout.checkpoints) == 6
            train(stored())
            found, damaged = newest(stored().layout.checkpoints)
            assert (found and found.name, damaged) == ("step-00000012", [])
        assert_ends_alike(stored(), whole)
        assert checkpoints(object_store, stored()) == {"step-00000009", "step-00000012"}


class TestARefusingStore:
    def test_training_goes_on_until_a_whole_checkpoint_is_behind(self, stored: Make, object_store: ObjectStore, whole):
        made, refusing, taken = stored(), threading.Event(), []
        first, second = (f"step-{step:08d}" for step in (3, 6))
        refusing.set()

        def before(step: int) -> None:
            taken.append(step)
            assert first not in checkpoints(object_store, made) or not refusing.is_set()
            if step == 5:
                threading.Timer(1.0, refusing.clear).start()
            if step == 6:
                assert first in checkpoints(object_store, made), "two copies of everything would be in memory"

        task = Waiting(made.optimiser)
        task.before = before  # type: ignore[method-assign]
        with object_store.refusing(
            lambda request: refusing.is_set() and request.method == "PUT" and first in request.path
        ):
            run_steps(task, made)
        assert object_store.failed
        assert taken == list(range(STEPS))
        assert second not in checkpoints(object_store, made), "it was followed by two others"
        assert_ends_alike(made, whole)

    def test_every_tenth_request_that_fails_changes_nothing(self, stored: Make, object_store: ObjectStore, whole):
        with object_store.refusing_every(10):
            train(stored(), stop_before=8)
            train(stored())
        assert object_store.failed
        assert_ends_alike(stored(), whole)

    def test_one_that_never_answers_ends_the_training_and_the_same_command_continues(
        self, stored: Make, object_store: ObjectStore, whole, monkeypatch
    ):
        made, task = stored(), Waiting(stored().optimiser)
        monkeypatch.setenv("NEXUS_RAY_STORAGE_DEADLINE", "0.5")
        refusing = threading.Event()

        def before(step: int) -> None:
            while step == 4 and steps_reached(made.layout.checkpoints) < 3:
                time.sleep(0.01)
            if step == 4:
                refusing.set()

        task.before = before  # type: ignore[method-assign]
        with object_store.refusing(lambda request: refusing.is_set()), pytest.raises(StorageError) as caught:
            run_steps(task, made)
        assert str(made.layout.directory) in caught.value.message
        assert "503" in caught.value.message
        assert "the same command" in (caught.value.hint or "")
        monkeypatch.delenv("NEXUS_RAY_STORAGE_DEADLINE")
        assert train(made).taken[0] == 3
        assert_ends_alike(made, whole)


class TestTheNodesOwnDisk:
    def test_a_full_one_is_told_and_the_checkpoint_before_is_continued(self, stored: Make, whole, monkeypatch):
        save, calls = checkpointing.save_file, list[Path]()

        def full_later(tensors: dict[str, Tensor], path: Path) -> None:
            calls.append(path)
            if len(calls) > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            save(tensors, path)

        with monkeypatch.context() as patch:
            patch.setattr(checkpointing, "save_file", full_later)
            with pytest.raises(StorageError, match="disk is full"):
                train(stored())
        assert train(stored()).taken[0] == 3
        assert_ends_alike(stored(), whole)


class TestMetrics:
    def test_they_hold_what_came_before_each_checkpoint_that_is_published_and_are_not_written_with_every_step(
        self, stored: Make, object_store: ObjectStore, monkeypatch
    ):
        monkeypatch.setattr(stored_lines, "_INTERVAL_SECONDS", 1000)
        made, known, written = stored(), dict[int, list[int]](), list[Request]()

        def look(request: Request) -> bool:
            if request.method == "PUT" and request.path.endswith("published.json") and "step-" in request.path:
                step = int(request.path.split("step-")[1][:8])
                known[step] = [r["step"] for r in stored_records(made) if r["event"] == "step"][:step]
            if request.method == "PUT" and request.path.endswith("metrics.jsonl"):
                written.append(request)
            return False

        with object_store.refusing(look):
            train(made)
        assert known == {step: list(range(step)) for step in (3, 6, 9, 12)}
        assert 2 <= len(written) <= 6, "at the beginning, before each of four checkpoints, and at the end"

    def test_the_last_records_are_there_at_the_end_also_of_a_training_that_fails(self, stored: Make):
        made = stored(on_nan="stop")
        with pytest.raises(Exception, match="step 5"):
            train(made, bad={5: float("nan")})
        assert events(made)[-1] == ("stopped", 4)

    def test_a_training_whose_last_records_are_refused_says_so(
        self, stored: Make, object_store: ObjectStore, monkeypatch
    ):
        made = stored()
        train(made)
        monkeypatch.setenv("NEXUS_RAY_STORAGE_DEADLINE", "0.3")
        puts = iter(range(100))

        def refused(request: Request) -> bool:
            return request.method == "PUT" and request.path.endswith("metrics.jsonl") and next(puts) >= 1

        with object_store.refusing(refused), pytest.raises(StorageError, match=r"metrics\.jsonl"):
            train(made)


class TestTensorBoard:
    def events(self, layout: RunLayout) -> list[Event]:
        """Of all files in the store, in the order of their making; by the format: length, checksum, data, checksum."""
        files = []
        for name in listed(layout.tensorboard):
            data, found = read_bytes(layout.tensorboard / name), list[Event]()
            while data:
                (length,) = struct.unpack("<Q", data[:8])
                found.append(Event.FromString(data[12 : 12 + length]))
                data = data[16 + length :]
            files.append(found)
        return [event for found in sorted(files, key=lambda found: found[0].wall_time) for event in found]

    def test_its_files_are_in_the_store_and_a_resumed_training_adds_one(self, stored: Make):
        train(stored(), stop_before=8)
        train(stored())
        events = self.events(stored().layout)
        losses = {event.step: value.simple_value for event in events for value in event.summary.value if is_loss(value)}
        told = {r["step"]: r["loss"] for r in read_metrics(stored().layout.metrics) if r["event"] == "step"}
        assert losses == pytest.approx(told)
        assert [event.step for event in events if event.HasField("session_log")] == [0, 6], "what they hide earlier"

    def test_files_go_there_while_training_goes_on(self, remote: Place, monkeypatch):
        monkeypatch.setattr(mirrored, "_INTERVAL_SECONDS", 0.0)
        monkeypatch.setattr(mirrored, "_SHARE", 0)
        files = Mirrored(remote)
        for content in (b"one", b"one two"):
            (files.directory / "events").write_bytes(content)
            files.copy_if_due()
            assert read_bytes(remote / "events") == content
        directory = files.directory
        files.close()
        assert not directory.exists()

    def test_a_store_that_refuses_them_costs_a_warning_and_no_training(
        self, stored: Make, object_store: ObjectStore, whole, monkeypatch
    ):
        monkeypatch.setenv("NEXUS_RAY_STORAGE_DEADLINE", "0.2")
        with object_store.refusing(lambda request: request.method == "PUT" and "tensorboard" in request.path):
            train(stored())
        assert_ends_alike(stored(), whole)
        (warning,) = [record for record in read_metrics(stored().layout.metrics) if record["event"] == "warning"]
        assert warning["kind"] == "tracker/TensorBoard"
        assert str(stored().layout.tensorboard) in warning["message"]

    def test_a_new_training_starts_with_none(self, stored: Make):
        train(stored(), stop_before=2)
        train(stored())
        assert len(listed(stored().layout.tensorboard)) == 1


def is_loss(value: Any) -> bool:
    return value.HasField("simple_value") and bool(value.tag == "train/loss")
