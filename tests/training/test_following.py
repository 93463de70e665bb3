"""Following a training: its progress moves with its steps, and each thing is told once although a resume repeats it."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest

from nexus_ray.errors import StorageError, error_to_record
from nexus_ray.training.messages import Box
from nexus_ray.training.watching import follow
from nexus_ray.training.watching.follow import Teller


@pytest.fixture
def told(caplog, monkeypatch) -> Any:
    """A function (records) -> the lines that are logged about them."""
    monkeypatch.setattr(logging.getLogger("nexus_ray"), "propagate", True)
    caplog.set_level(logging.INFO, logger="nexus_ray")
    teller = Teller()

    def tell(*records: dict[str, Any]) -> list[tuple[str, str]]:
        caplog.clear()
        for record in records:
            teller.tell(record)
        return [(record.levelname, record.message) for record in caplog.records]

    return tell


class TestProgress:
    @pytest.fixture
    def advanced(self, monkeypatch) -> Any:
        """A function (batches of records) -> by how many steps the progress bar has advanced, each time."""
        monkeypatch.setattr(follow, "_INTERVAL_SECONDS", 0.001)

        def of(*batches: list[dict[str, Any]]) -> list[int]:
            waiting, finished, steps = list(batches), threading.Event(), list[int]()

            def new_records() -> list[dict[str, Any]]:
                if len(waiting) == 1:
                    finished.set()
                return waiting.pop(0) if waiting else []

            follow._follow(new_records, steps.append, finished)
            return steps

        return of

    def test_it_moves_with_every_step(self, advanced):
        steps = [{"event": "step", "step": step} for step in range(5)]
        assert advanced(steps[:2], [], steps[2:]) == [1] * 5

    def test_what_is_recorded_last_counts_too(self, advanced):
        assert sum(advanced([{"event": "step", "step": 0}])) == 1

    def test_a_continued_training_begins_where_the_one_before_it_ended(self, advanced):
        assert advanced([{"event": "resume", "step": 40}, {"event": "step", "step": 40}]) == [40, 1]

    def test_steps_that_are_taken_again_do_not_move_it(self, advanced):
        records = [{"event": "step", "step": step} for step in (0, 1, 2)]
        again = [{"event": "resume", "step": 1}, *records[1:], {"event": "step", "step": 3}]
        assert sum(advanced(records, again)) == 4


class TestBox:
    def test_each_record_is_taken_once(self):
        box = Box()
        box.add({"step": 0})
        box.add({"step": 1})
        assert box.take() == [{"step": 0}, {"step": 1}]
        assert box.take() == []

    def test_the_first_error_is_the_cause_of_the_others(self):
        box = Box()
        assert box.error() is None
        for message in ("the store does not answer", "a worker is gone"):
            box.fail(error_to_record(StorageError(message, "the same command continues")))
        assert (box.error() or {})["message"] == "the store does not answer"


class TestWords:
    def test_validation_by_source(self, told):
        record = {"event": "validation", "step": 39, "loss": 4.25, "losses": {"play": 4.0, "prose": 3.5}}
        assert told(record) == [("INFO", "step 40: validation loss 4.2500 nats (play 4.0000, prose 3.5000)")]

    def test_warnings_are_loud_and_say_what_to_do(self, told):
        record = {"event": "warning", "step": 9, "kind": "clipped", "message": "much is clipped", "hint": "lower it"}
        assert told(record) == [("WARNING", "step 10: much is clipped\n  -> lower it")]

    def test_a_repeated_record_is_told_once_and_another_kind_is_not_repeated(self, told):
        record = {"event": "warning", "step": 9, "kind": "clipped", "message": "clipped", "hint": ""}
        other = record | {"kind": "overlap", "message": "overlap"}
        assert len(told(record, record, other)) == 2
        assert told(record, other) == []

    def test_samples_can_be_read(self, told):
        record = {"event": "sample", "step": 0, "prompt": "O Romeo", "text": ",\nRomeo"}
        assert told(record) == [("INFO", "step 1: 'O Romeo' goes on ',\\nRomeo'")]

    def test_steps_and_checkpoints_are_not_told(self, told):
        assert told({"event": "step", "step": 0, "loss": 1.0}, {"event": "checkpoint", "step": 0}) == []

    def test_skipped_steps_name_their_sequences(self, told):
        ((level, line),) = told({"event": "skipped", "step": 4, "sequences": ["play 7"]})
        assert (level, line.endswith("not finite: play 7")) == ("WARNING", True)

    def test_a_merge_that_was_not_made_says_why(self, told):
        assert told({"event": "merge_skipped", "step": 4, "reason": "no anchor"}) == [
            ("WARNING", "step 5: not merged: no anchor")
        ]

    def test_an_early_stop_says_why(self, told):
        ((_, line),) = told({"event": "early_stop", "step": 3, "validations_without_gain": 5})
        assert line == "step 4: stopped: 5 validations without a better one"
