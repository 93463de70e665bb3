"""Following a training: every record is read once while the file grows, and told once although a resume repeats it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.training.watching.follow import Teller
from nexus_ray.training.watching.metrics import MetricsLog, MetricsTail


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


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


class TestTail:
    def test_each_record_comes_once(self, path: Path):
        tail, log = MetricsTail(path), MetricsLog(path, 0)
        assert tail.new_records() == []
        for step in range(3):
            log.write("step", step, text="é\u2028")
            assert [record["step"] for record in tail.new_records()] == [step]
            assert tail.new_records() == []

    @pytest.mark.parametrize("cut", [0, 1, 10, 20])
    def test_a_record_that_is_being_written_comes_when_it_is_complete(self, path: Path, cut: int):
        lines = [json.dumps({"event": "step", "step": step}) + "\n" for step in range(2)]
        tail = MetricsTail(path)
        path.write_text(lines[0] + lines[1][:cut])
        assert [record["step"] for record in tail.new_records()] == [0]
        with path.open("a") as file:
            file.write(lines[1][cut:])
        assert [record["step"] for record in tail.new_records()] == [1]

    def test_a_file_that_a_resumed_run_has_replaced_is_read_again(self, path: Path):
        tail, log = MetricsTail(path), MetricsLog(path, 0)
        for step in range(4):
            log.write("step", step)
        tail.new_records()
        MetricsLog(path, 2).write("step", 2)
        assert [record["step"] for record in tail.new_records()] == [0, 1, 2]

    def test_no_file_has_no_records(self, path: Path):
        assert MetricsTail(path).new_records() == []


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
