"""Rows that cannot be read are counted once each, wherever shards are cut, and named; a strict run stops at them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nexus_ray.config import Config, DataSection
from nexus_ray.data.documents import read_documents
from nexus_ray.data.packing import pack_shard
from nexus_ray.data.sources import list_shards
from nexus_ray.data.unreadable import UnreadableRows
from nexus_ray.errors import DataError, ModelError
from nexus_ray.pipeline import Run

UNREADABLE = {
    "no json": b'{"text": "cut off',
    "no utf-8": b'{"text": "\xff"}',
    "no form": b'{"title": "x"}',
    "a deep nest": b"[" * 100_000,
    "an unknown role": b'{"messages": [{"role": "narrator", "content": "x"}]}',
    "refused by the template": b'{"messages": [{"role": "tool", "content": "no call before it"}]}',
    "a surrogate": b'{"text": "\\ud800"}',
}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_directory)


def data_of(path: Path, shard_bytes: int = 1024, strict: bool = False) -> DataSection:
    return DataSection.model_validate(
        {"sources": {"play": {"train": str(path)}}, "shard_bytes": shard_bytes, "strict": strict}
    )


def count(data: DataSection, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, Any]], list[int]]:
    """What workers would return for each shard, and all token ids."""
    rows, ids = [], []
    for shard in list_shards(data, "train"):
        unreadable = UnreadableRows(data.strict)
        for sequence in pack_shard(shard, tokenizer, 64, unreadable.handler):
            ids += sequence.input_ids[1 : sequence.num_tokens].tolist()
        rows.append({"shard": shard.index, **unreadable.as_row()})
    return rows, ids


@pytest.mark.parametrize("bad", UNREADABLE.values(), ids=UNREADABLE)
def test_such_a_row_is_passed_over_and_its_neighbours_are_read(bad: bytes, tokenizer, tmp_path: Path) -> None:
    good = json.dumps({"text": "To be or not to be."}).encode()
    (tmp_path / "whole.jsonl").write_bytes(b"\n".join([good, good]))
    (tmp_path / "broken.jsonl").write_bytes(b"\n".join([good, bad, good]))
    _, expected = count(data_of(tmp_path / "whole.jsonl", 10**6), tokenizer)
    [row], ids = count(data_of(tmp_path / "broken.jsonl", 10**6), tokenizer)
    assert ids == expected
    assert row["unreadable"] == 1
    assert row["unreadable_example"].startswith(f"{tmp_path}/broken.jsonl, byte {len(good) + 1}: ")


@pytest.mark.parametrize("bad", UNREADABLE.values(), ids=UNREADABLE)
def test_a_strict_reader_stops_there_and_names_the_place(bad: bytes, tokenizer, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_bytes(b'{"text": "x"}\n' + bad)
    with pytest.raises(DataError, match=r"broken\.jsonl, byte 14: "):
        count(data_of(tmp_path / "broken.jsonl", strict=True), tokenizer)
    [shard, *_] = list_shards(data_of(tmp_path / "broken.jsonl", 10**6), "train")
    with pytest.raises(DataError, match=r"broken\.jsonl, byte 14: "):
        list(pack_shard(shard, tokenizer, 64))


@pytest.mark.parametrize("shard_bytes", range(1024, 1280, 16))
def test_a_broken_line_is_counted_once_wherever_shards_are_cut(shard_bytes: int, tokenizer, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{i} " + "word " * (i * 13 % 60)}) for i in range(40)]
    broken = '{"text": "' + "x" * 2500  # over several shards
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:17], broken, *lines[17:]]) + "\n")
    data = data_of(tmp_path / "a.jsonl", shard_bytes)
    rows, _ = count(data, tokenizer)
    assert sum(row["unreadable"] for row in rows) == 1
    position = len("\n".join(lines[:17])) + 1
    assert [row["unreadable_example"].split(":")[0] for row in rows if row["unreadable"]] == [
        f"{tmp_path}/a.jsonl, byte {position}"
    ]
    texts = [d.text for s in list_shards(data, "train") for d in read_documents(s, lambda error: None)]
    assert texts == [json.loads(line)["text"] for line in lines]


def test_a_model_without_a_template_is_no_fault_of_the_rows(tokenizer_directory: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    tokenizer.chat_template = None
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"prompt": "x", "response": "y"}\n')
    with pytest.raises(ModelError, match="no chat template"):
        count(data_of(tmp_path / "a.jsonl"), tokenizer)


def returned(shard: int, count: int) -> dict[str, Any]:
    return {"shard": shard, "unreadable": count, "unreadable_example": f"a.jsonl, byte {shard}: bad" if count else ""}


class TestReport:
    def warnings(self, unreadable: UnreadableRows, caplog: pytest.LogCaptureFixture) -> list[str]:
        with caplog.at_level(logging.WARNING):
            unreadable.warn("train")
        return [record.message for record in caplog.records]

    def test_one_warning_a_source_with_the_count_and_the_first_place(self, caplog):
        unreadable = UnreadableRows()
        for shard, number in ((9, 1), (3, 1200), (1, 0)):  # workers end in any order
            unreadable.add_row("play", returned(shard, number))
        unreadable.add_row("prose", returned(10, 0))
        unreadable.add_row("code", returned(11, 1))
        play, code = self.warnings(unreadable, caplog)
        assert play.startswith(
            "data.sources.play.train: 1,201 rows cannot be read and are left out; the first: a.jsonl"
        )
        assert "a.jsonl, byte 3: bad" in play
        assert (unreadable.first("play"), unreadable.first("prose")) == ("a.jsonl, byte 3: bad", "")
        assert code.startswith("data.sources.code.train: 1 row cannot be read and is left out")
        assert (unreadable.total("play"), unreadable.total("prose"), unreadable.total("none")) == (1201, 0, 0)

    def test_the_same_shard_read_twice_is_counted_and_warned_of_once(self, caplog):
        unreadable = UnreadableRows()
        for _ in range(2):
            unreadable.add_row("play", returned(0, 2))
            found = self.warnings(unreadable, caplog)
        assert unreadable.total("play") == 2
        assert len(found) == 1

    def test_nothing_unreadable_is_not_worth_a_word(self, caplog):
        unreadable = UnreadableRows()
        unreadable.add_row("play", returned(0, 0))
        assert self.warnings(unreadable, caplog) == []

    def test_a_source_of_which_nothing_was_read_is_an_error(self):
        unreadable = UnreadableRows()
        unreadable.add_row("play", returned(0, 7))
        with pytest.raises(DataError, match=r"play\.train: no row can be read; the first of 7: a\.jsonl, byte 0"):
            unreadable.warn("train", without_text=["play"])

    def test_what_an_earlier_call_left_out_stops_a_strict_one(self):
        unreadable = UnreadableRows(strict=True)
        unreadable.add_row("play", returned(4, 1))
        with pytest.raises(DataError, match=r"a\.jsonl, byte 4: bad"):
            unreadable.warn("train")


def test_strictness_is_no_part_of_the_recipe_of_any_stage(micro_config: Callable[..., Config], tmp_path: Path) -> None:
    runs = [Run(micro_config(tmp_path, **{"data.strict": strict})) for strict in (False, True)]
    for stage in ("collect", "select", "convert", "precompute", "train", "evaluate"):
        assert runs[0].recipe(stage) == runs[1].recipe(stage)
