"""Precompute with rows that cannot be read: left out and reported, also those of a call that was interrupted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from precompute_here import run_workers_here

from nexus_ray.config import Config, ResourcesSection
from nexus_ray.errors import DataError
from nexus_ray.targets.format import MANIFEST
from nexus_ray.targets.writing import precompute as module
from nexus_ray.targets.writing.job import PrecomputeJob, job_of_text
from nexus_ray.targets.writing.precompute import precompute


@pytest.fixture(autouse=True)
def _workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    run_workers_here(monkeypatch)


@pytest.fixture
def job(micro_config: Callable[..., Config], micro_texts: Path, micro_model: Path, tmp_path: Path):
    """A function (bad lines, strict) -> job on a text with these lines in the middle; without a teacher."""

    def make(bad: Sequence[str], strict: bool = False, good: bool = True) -> PrecomputeJob:
        lines = (micro_texts / "play.train.jsonl").read_text().splitlines() if good else []
        (tmp_path / "a.jsonl").write_text("\n".join([*lines[:5], *bad, *lines[5:]]) + "\n")
        overrides = {"data.sources.play.train": str(tmp_path / "a.jsonl"), "data.strict": strict}
        config = micro_config(tmp_path / "run", **overrides)
        return replace(job_of_text(config.data, micro_model), names=("play",))

    return make


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "cannot be read" in record.message]


def test_such_rows_are_left_out_and_reported_once(job, tmp_path: Path, caplog) -> None:
    whole = precompute(job([]), tmp_path / "whole", ResourcesSection())
    assert warnings(caplog) == []
    with caplog.at_level(logging.WARNING):
        found = precompute(job(["no json", '{"title": "x"}']), tmp_path / "broken", ResourcesSection())
    # Where shards are cut moves by the length of the bad lines; the text itself is all there.
    assert sum(file.tokens for file in found.files) == pytest.approx(sum(file.tokens for file in whole.files), rel=0.01)
    [warning] = warnings(caplog)
    assert "data.sources.play.train: 2 rows cannot be read and are left out" in warning
    assert pq.read_table(tmp_path / "broken" / found.files[0].name).num_rows == found.files[0].sequences
    assert [file.unreadable for file in found.files if file.unreadable] == [2]


def test_a_strict_run_stops_at_the_first(job, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, byte \d+: not a JSON line"):
        precompute(job(["no json"], strict=True), tmp_path / "targets", ResourcesSection())
    assert not (tmp_path / "targets" / MANIFEST).exists()


def test_rows_that_an_interrupted_call_left_out_are_reported_too(job, tmp_path: Path, monkeypatch, caplog) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_check_enough_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            precompute(job(["no json"]), tmp_path / "targets", ResourcesSection())
    caplog.clear()
    with pytest.raises(DataError, match="not a JSON line"):
        precompute(job(["no json"], strict=True), tmp_path / "targets", ResourcesSection())
    precompute(job(["no json"]), tmp_path / "targets", ResourcesSection())
    assert len(warnings(caplog)) == 1


def test_a_text_without_a_readable_row_is_refused(job, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"play\.train: no row can be read; the first of 2: .*byte 0: not a JSON line"):
        precompute(job(["no json", "none"], good=False), tmp_path / "targets", ResourcesSection())
