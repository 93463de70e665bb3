"""A shard's file: rows in groups of bounded size, whatever the batches were, and nothing left of one that failed."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from nexus_ray.data.packing import Batch
from nexus_ray.errors import StorageError
from nexus_ray.targets.encoding.encodings import HiddenEncoding
from nexus_ray.targets.encoding.routers import RouterEncoding
from nexus_ray.targets.format import METADATA_KEY, Header
from nexus_ray.targets.writing import shard_file as module
from nexus_ray.targets.writing.shard_file import rows_of_group, writing_shard

LENGTH, EVERY = 12, 5
KEY = "0123456789abcdef"


def header(hidden_size: int = 8) -> Header:
    return Header(
        base_fingerprint="base",
        compute={"device": "cpu"},
        tokenizer_sha256="tokenizer",
        vocabulary=100,
        sequence_length=LENGTH,
        separator=0,
        output=HiddenEncoding(hidden_size=hidden_size),
        router=RouterEncoding(mode="logits", layers=(0, 2), every=EVERY, experts=4, experts_per_token=2),
    )


def random_rows(count: int, seed: int = 0) -> tuple[Batch, list[dict[str, bytes]]]:
    """Sequences, all full but the last one, and what each says in every column."""
    generator = np.random.default_rng(seed)
    num_tokens = np.full(count, LENGTH, np.int32)
    num_tokens[-1] = 7
    widths = [(name, width, False) for name, width in header().output.widths().items()]
    widths += [(name, width, True) for name, width in header().router.widths().items()]
    rows = []
    for tokens in num_tokens.tolist():
        counts = {True: -(-tokens // EVERY), False: tokens - 1}
        rows.append({name: generator.bytes(counts[router] * width) for name, width, router in widths})
    return Batch(generator.integers(0, 100, (count, LENGTH), dtype=np.int32), num_tokens), rows


def write(path: Path, batch: Batch, rows: list[dict[str, bytes]], size: int) -> module.ShardFile:
    widths = header().output.widths() | header().router.widths()
    with writing_shard(path, header(), "play", KEY, output=True, router=True) as shard:
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            columns = {
                name: np.frombuffer(b"".join(row[name] for row in rows[part]), np.uint8).reshape(-1, width)
                for name, width in widths.items()
            }
            shard.add(Batch(batch.input_ids[part], batch.num_tokens[part]), columns)
    return shard


@pytest.mark.parametrize("group_bytes", [1, 700, 1 << 18])
@pytest.mark.parametrize("size", [1, 3, 8, 21])
def test_rows_come_back_as_they_were_whatever_batches_and_groups_are(group_bytes, size, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", group_bytes)
    batch, rows = random_rows(21)
    shard = write(tmp_path / "shard.parquet", batch, rows, size)
    found = pq.read_table(tmp_path / "shard.parquet").to_pylist()
    assert len(found) == len(rows) == shard.sequences
    for number, (row, expected) in enumerate(zip(found, rows, strict=True)):
        tokens = int(batch.num_tokens[number])
        assert {name: row[name] for name in expected} == expected
        assert row["input_ids"] == batch.input_ids[number, :tokens].tolist()
        assert row["loss_mask"] == [False] + [True] * (tokens - 1)
        assert (row["num_tokens"], row["num_targets"]) == (tokens, tokens - 1)
        assert row["sequence_id"] == f"play/{KEY}/{number}"
    assert shard.tokens == batch.num_tokens.sum()
    assert shard.targets == batch.num_tokens.sum() - len(rows)


def test_a_row_group_holds_as_many_full_rows_as_fit_and_at_least_one(tmp_path, monkeypatch) -> None:
    row = LENGTH * 4 + (LENGTH - 1) * 16 + 3 * sum(header().router.widths().values())
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", 5 * row + row - 1)
    assert rows_of_group(header(), output=True, router=True) == 5
    assert rows_of_group(header(), output=False, router=False) == (6 * row - 1) // (LENGTH * 4)
    assert rows_of_group(header(hidden_size=2880), output=True, router=True) == 1
    write(tmp_path / "shard.parquet", *random_rows(21), size=4)
    metadata = pq.ParquetFile(tmp_path / "shard.parquet").metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [5, 5, 5, 5, 1]


def test_a_shard_says_what_it_is(tmp_path) -> None:
    write(tmp_path / "shard.parquet", *random_rows(3), size=2)
    file = pq.ParquetFile(tmp_path / "shard.parquet")
    said = json.loads(file.schema_arrow.metadata[METADATA_KEY])
    assert (said["source"], said["output"], said["router"]) == ("play", True, True)
    assert Header.model_validate(said["header"]) == header()
    group = file.metadata.row_group(0)
    with_statistics = {group.column(i).path_in_schema for i in range(group.num_columns) if group.column(i).is_stats_set}
    assert with_statistics == {"num_tokens", "num_targets"}, "bounds of random bytes would only take space"


def test_a_shard_without_a_sequence_can_be_read(tmp_path) -> None:
    with writing_shard(tmp_path / "shard.parquet", header(), "play", KEY, output=False, router=False):
        pass
    assert pq.read_table(tmp_path / "shard.parquet").num_rows == 0


def test_the_same_rows_give_the_same_bytes(tmp_path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, *random_rows(9), size=4)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing(after, tmp_path, monkeypatch) -> None:
    left = iter(range(after))
    write_table = pq.ParquetWriter.write_table

    def full(self: pq.ParquetWriter, *arguments: object, **options: object) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_table(self, *arguments, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", 1)
    with pytest.raises(StorageError, match=r"cannot write .*shard\.parquet: the disk is full"):
        write(tmp_path / "shard.parquet", *random_rows(9), size=4)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_shard_leaves_the_one_that_was_there(tmp_path) -> None:
    path = tmp_path / "shard.parquet"
    path.write_bytes(b"as it was")

    def interrupted() -> None:
        with writing_shard(path, header(), "play", KEY, output=False, router=False) as shard:
            shard.add(random_rows(3)[0], {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"as it was"
    assert list(tmp_path.iterdir()) == [path]
