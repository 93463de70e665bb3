"""Recovery checkpoints: written behind the training's back, the newest few kept, damaged ones passed over."""

from __future__ import annotations

import errno
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nexus_ray.errors import StorageError
from nexus_ray.training import checkpointing, recovery
from nexus_ray.training.checkpointing import Snapshot, load_checkpoint, read_state, take_snapshot
from nexus_ray.training.recovery import RecoveryPoints, newest, steps_reached


def snapshot_after(step: int, model: nn.Module | None = None) -> Snapshot:
    torch.manual_seed(step)
    return take_snapshot(dict((model or nn.Linear(3, 2)).named_parameters()), {"step": step})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def written(directory: Path, *steps: int, keep: int = 2) -> RecoveryPoints:
    points = RecoveryPoints(directory, keep)
    for step in steps:
        points.write(snapshot_after(step))
        points.finished(wait=True)
    return points


def test_the_newest_ones_are_kept(tmp_path):
    written(tmp_path, 4, 8, 12)
    assert names(tmp_path) == ["step-00000008", "step-00000012"]
    assert newest(tmp_path)[0] == tmp_path / "step-00000012"
    assert steps_reached(tmp_path) == 12


def test_nothing_is_there_at_first(tmp_path):
    assert newest(tmp_path / "none") == (None, [])
    assert steps_reached(tmp_path / "none") == 0


def test_a_snapshot_is_what_the_weights_were_when_it_was_taken(tmp_path):
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    snapshot = take_snapshot(dict(model.named_parameters()), {"step": 1})
    with torch.no_grad():
        model.weight.add_(1)
    points = RecoveryPoints(tmp_path, 1)
    points.write(snapshot)
    points.close()
    restored = nn.Linear(3, 2)
    load_checkpoint(newest(tmp_path)[0] or tmp_path, dict(restored.named_parameters()))
    assert torch.equal(restored.weight, before)


def test_training_goes_on_while_one_is_written(tmp_path, monkeypatch):
    may_end = threading.Event()

    def slow(tensors, path):
        assert may_end.wait(30)
        save_file(tensors, path)

    monkeypatch.setattr(checkpointing, "save_file", slow)
    points = RecoveryPoints(tmp_path, 2)
    points.write(snapshot_after(4))
    assert points.finished() == []
    assert newest(tmp_path)[0] is None
    may_end.set()
    assert points.finished(wait=True) == [4]
    assert newest(tmp_path)[0] == tmp_path / "step-00000004"


def test_each_is_announced_once_when_it_is_there(tmp_path):
    points = RecoveryPoints(tmp_path, 2)
    points.write(snapshot_after(4))
    assert points.finished(wait=True) == [4]
    points.write(snapshot_after(8))
    assert points.finished(wait=True) == [8]
    assert points.finished(wait=True) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "state"])
def test_a_damaged_one_is_passed_over(tmp_path, damage):
    written(tmp_path, 4, 8)
    last = tmp_path / "step-00000008"
    content = bytearray((last / "state.safetensors").read_bytes())
    content[-1] ^= 1
    if damage == "state":
        (last / "state.json").write_text("{")
    else:
        (last / "state.safetensors").write_bytes(content if damage == "flip" else content[:-5])
    found, (reason,) = newest(tmp_path)
    assert found == tmp_path / "step-00000004"
    assert "step-00000008" in reason
    assert read_state(tmp_path / "step-00000004") == {"step": 4}


def test_one_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch):
    written(tmp_path, 4, 8)

    def refuse(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpointing, "sha256_file", refuse)
    with pytest.raises(StorageError, match=r"cannot read the checkpoint .*step-00000008: Input/output error"):
        newest(tmp_path)


def test_one_whose_writer_was_killed_between_two_renames_is_put_in_its_place(tmp_path):
    written(tmp_path, 4)
    (tmp_path / "step-00000004").rename(tmp_path / ".step-00000004.1234abcd.partial")
    recovery.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-00000004"]
    assert read_state(tmp_path / "step-00000004") == {"step": 4}


def test_what_a_killed_writer_left_is_removed_and_never_read(tmp_path):
    written(tmp_path, 4)
    leftover = tmp_path / ".step-00000008.1234abcd.partial"
    leftover.mkdir()
    (leftover / "state.safetensors").write_bytes(b"half")
    assert newest(tmp_path)[0] == tmp_path / "step-00000004"
    RecoveryPoints(tmp_path, 2).close()
    assert names(tmp_path) == ["step-00000004"]


def test_a_write_that_the_system_refuses_is_told_at_the_next_opportunity_and_older_ones_stay(tmp_path):
    """The limit on file sizes is the system's own refusal in the middle of a file, as a full disk is."""
    points = written(tmp_path, 4)
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        points.write(snapshot_after(8, nn.Linear(100, 100)))
        with pytest.raises(StorageError, match=r"cannot write .*step-00000008"):
            points.finished(wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == ["step-00000004"]
    assert newest(tmp_path)[0] == tmp_path / "step-00000004"


def test_a_checkpoint_does_not_speak_of_best_weights_that_could_not_be_written(tmp_path):
    points = written(tmp_path / "checkpoints", 4)
    (tmp_path / "file").touch()
    points.write_best(tmp_path / "file" / "best", lambda: snapshot_after(8))
    points.write(snapshot_after(8))
    with pytest.raises(StorageError, match="a file stands where a directory is needed"):
        points.all_finished()
    points.close()
    assert names(tmp_path / "checkpoints") == ["step-00000004"]


def test_the_end_of_a_training_waits_for_the_best_weights_too(tmp_path):
    points = written(tmp_path / "checkpoints", 4)
    (tmp_path / "file").touch()
    points.write_best(tmp_path / "file" / "best", lambda: snapshot_after(8))
    with pytest.raises(StorageError, match="a file stands where a directory is needed"):
        points.all_finished()


def test_older_ones_go_only_after_the_new_one_stands(tmp_path, monkeypatch):
    points = written(tmp_path, 4, keep=1)

    def broken(directory, snapshot):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(recovery, "write_snapshot", broken)
    points.write(snapshot_after(8))
    with pytest.raises(OSError, match="Input"):
        points.finished(wait=True)
    assert names(tmp_path) == ["step-00000004"]


def test_a_damaged_newer_one_does_not_cost_those_written_after_it(tmp_path):
    written(tmp_path, 80, keep=1)
    (tmp_path / "step-00000080" / "state.json").write_text("{")
    assert newest(tmp_path)[0] is None
    written(tmp_path, 20, 40, keep=1)
    assert names(tmp_path) == ["step-00000040"]
