"""What makes two shards the same text: the lines that are read, not the file that they stand in."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from nexus_ray.config import DataSection
from nexus_ray.data.documents import read_documents
from nexus_ray.data.shard_identity import text_identities
from nexus_ray.data.sources import Shard, list_shards
from nexus_ray.errors import DataError


def shards_of(place: str | Path, shard_bytes: int = 1024) -> list[Shard]:
    data = {"sources": {"play": {"train": str(place)}}, "shard_bytes": shard_bytes}
    return list_shards(DataSection.model_validate(data), "train")


def write_lines(path: Path, seed: int, count: int = 40) -> list[str]:
    generator = random.Random(seed)
    lines = [json.dumps({"text": "é" * generator.choice([0, 3, 200, 2500])}, ensure_ascii=False) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n" * generator.randrange(2), encoding="utf-8")
    return lines


@pytest.mark.parametrize("seed", range(8))
def test_a_shard_of_lines_is_the_lines_that_start_in_it(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "play.jsonl"
    write_lines(path, seed)
    lines = path.read_bytes().splitlines(keepends=True)
    starts = [sum(map(len, lines[:number])) for number in range(len(lines))]
    shards = shards_of(path)
    for shard, identity in zip(shards, text_identities(shards), strict=True):
        mine = [line for start, line in zip(starts, lines, strict=True) if shard.start <= start < shard.stop]
        assert identity == [".jsonl", "", hashlib.sha256(b"".join(mine)).hexdigest()]
        assert [json.loads(line)["text"] for line in mine] == [document.text for document in read_documents(shard)]


@pytest.mark.parametrize("seed", range(8))
def test_appended_lines_leave_the_earlier_shards_what_they_were(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "play.jsonl"
    lines = write_lines(path, seed)
    before = text_identities(shards_of(path))
    path.write_text("\n".join([*lines, *lines]) + "\n", encoding="utf-8")
    assert text_identities(shards_of(path))[: len(before) - 1] == before[:-1]


def test_a_changed_byte_changes_the_shard_that_reads_it_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "play.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number:03d}" * 100}) + "\n" for number in range(20)))
    before, content = text_identities(shards_of(path)), bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    changed = [one != two for one, two in zip(before, text_identities(shards_of(path)), strict=True)]
    assert sum(changed) == 1


def test_the_place_of_a_file_does_not_matter_but_its_kind_and_field_do(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "a.txt")]
    for path in paths:
        path.write_text('{"text": "speak the speech"}\n')
    shards = [Shard(0, "play", str(path), 0, 29) for path in paths]
    one, moved, plain = text_identities(shards)
    assert one == moved != plain
    assert text_identities([Shard(0, "play", str(paths[0]), 0, 29, "body")]) != [one]


def test_row_groups_of_a_file_differ_by_their_number(tmp_path: Path) -> None:
    table = pa.table({"text": ["same", "same"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=1)
    found = [text_identities(shards_of(tmp_path / name)) for name in ("a.parquet", "b.parquet")]
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_a_dataset_is_known_by_its_fingerprint(tmp_path: Path) -> None:
    for name, words in (("one", "alpha"), ("two", "beta")):
        Dataset.from_dict({"text": [words] * 4}).save_to_disk(tmp_path / name)
    (tmp_path / "one").rename(tmp_path / "moved")
    first, second = (text_identities(shards_of(tmp_path / name)) for name in ("moved", "two"))
    assert first != second
    (tmp_path / "moved").rename(tmp_path / "one")
    assert text_identities(shards_of(tmp_path / "one")) == first


def test_a_remote_file_is_known_by_what_its_store_says() -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/identity/play.jsonl", b'{"text": "one"}\n')
    before = text_identities(shards_of("memory://identity/*.jsonl"))
    assert text_identities(shards_of("memory://identity/*.jsonl")) == before
    store.pipe("/identity/play.jsonl", b'{"text": "two"}\n')
    assert text_identities(shards_of("memory://identity/*.jsonl")) != before


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read"):
        text_identities([Shard(0, "play", str(tmp_path / "gone.jsonl"), 0, 10)])
