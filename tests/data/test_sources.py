"""Shards hold every document exactly once, whatever their size; what cannot be read is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nexus_ray.config import DataSection
from nexus_ray.data.documents import read_documents
from nexus_ray.data.row_forms import Document
from nexus_ray.data.sources import list_shards
from nexus_ray.errors import DataError

CONVERSATION = [{"role": "user", "content": "Who's there?"}, {"role": "assistant", "content": "Nay, answer me."}]


def section(train: Any, heldout: Any = (), shard_bytes: int = 1024, text_field: str | None = None) -> DataSection:
    source = {"train": train, "heldout": heldout, "text_field": text_field}
    return DataSection.model_validate({"sources": {"play": source}, "shard_bytes": shard_bytes})


def documents(data: DataSection) -> list[Document]:
    return [document for shard in list_shards(data, "train") for document in read_documents(shard)]


def texts(data: DataSection) -> list[str | None]:
    return [document.text for document in documents(data)]


def refusal(data: DataSection) -> str:
    with pytest.raises(DataError) as caught:
        documents(data)
    return str(caught.value)


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class TestJsonLines:
    # Lengths around the shard size, with letters of one to four bytes, so that cuts fall everywhere in a line.
    TEXTS = tuple(f"{i} " + "aé日👩"[i % 4] * (i * 37 % 700) for i in range(60))

    @pytest.mark.parametrize("shard_bytes", [1024, 1025, 1027, 1500, 2048, 4099, 10**6])
    def test_the_shards_together_hold_each_document_once_in_order(self, tmp_path, shard_bytes):
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in self.TEXTS])
        data = section(path, shard_bytes=shard_bytes)
        assert texts(data) == list(self.TEXTS)
        size = Path(path).stat().st_size
        assert len(list_shards(data, "train")) == -(-size // shard_bytes)

    @pytest.mark.parametrize("first_line", [1022, 1023, 1024, 1025])
    def test_a_line_that_ends_where_a_shard_ends(self, tmp_path, first_line):
        path = tmp_path / "a.jsonl"
        text = "x" * (first_line - len('{"text": ""}\n'))
        write_jsonl(path, [{"text": text}, {"text": "second"}, {"text": "third"}])
        assert path.read_bytes().index(b"\n") == first_line - 1
        assert texts(section(str(path))) == [text, "second", "third"]

    def test_one_line_longer_than_many_shards(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * 5000}, {"text": "after"}])
        assert texts(section(path)) == ["x" * 5000, "after"]

    def test_no_newline_at_the_end_and_empty_lines(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "one"}\n\n   \r\n{"text": "two"}', encoding="utf-8")
        assert texts(section(str(path))) == ["one", "two"]

    def test_the_text_field_may_have_another_name(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"body": "b", "text": "t"}])
        assert texts(section(path, text_field="body")) == ["b"]

    def test_conversations(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"messages": CONVERSATION}, {"text": "plain"}])
        assert documents(section(path)) == [Document(messages=tuple(CONVERSATION)), Document(text="plain")]

    @pytest.mark.parametrize("row", [b'{"text": "cut', b"not json", b'{"text": "\xff"}'])
    def test_a_line_that_is_no_json_is_named(self, tmp_path, row):
        path = tmp_path / "bad.jsonl"
        path.write_bytes(b'{"text": "good"}\n' + row + b"\n")
        message = refusal(section(str(path)))
        assert f"{path}, byte 17: not a JSON line" in message

    @pytest.mark.parametrize("row", [{"txt": "x"}, {"text": 3}, {"text": None}, ["text"], "text"])
    def test_a_row_without_text_is_named(self, tmp_path, row):
        path = write_jsonl(tmp_path / "bad.jsonl", [row])
        message = refusal(section(path))
        assert f"{path}, byte 0" in message
        assert "text_field" in message, "what is accepted"


class TestOtherKinds:
    def test_a_text_file_is_one_document(self, tmp_path):
        text = "Enter Ghost.\n\nMark me.\n" * 200
        (tmp_path / "a.txt").write_text(text)
        assert texts(section(str(tmp_path / "a.txt"))) == [text]

    def test_a_text_file_in_another_encoding(self, tmp_path):
        (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
        assert f"{tmp_path / 'a.txt'} is not UTF-8" in refusal(section(str(tmp_path / "a.txt")))

    def test_parquet_is_cut_by_row_groups(self, tmp_path):
        path = tmp_path / "a.parquet"
        expected = [f"document {i}" for i in range(25)]
        pq.write_table(pa.table({"text": expected}), path, row_group_size=10)
        data = section(str(path))
        assert len(list_shards(data, "train")) == 3
        assert texts(data) == expected

    def test_parquet_conversations(self, tmp_path):
        pq.write_table(pa.table({"messages": [CONVERSATION]}), tmp_path / "a.parquet")
        assert documents(section(str(tmp_path / "a.parquet"))) == [Document(messages=tuple(CONVERSATION))]

    def test_a_bad_parquet_row_is_named(self, tmp_path):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": ["a", "b", None]}), path, row_group_size=2)
        assert f"{path}, row group 1, row 0" in refusal(section(str(path)))

    def test_parquet_without_rows(self, tmp_path):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
        assert f"{path} is empty" in refusal(section(str(path)))

    def test_a_damaged_parquet_file_is_an_error_even_when_rows_may_be_left_out(self, tmp_path):
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": ["word " * 50 + str(i) for i in range(500)]}), path, compression="zstd")
        [shard] = list_shards(section(str(path)), "train")
        damaged = bytearray(path.read_bytes())
        damaged[200:1200] = bytes(1000)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
            list(read_documents(shard, lambda error: None))

    def test_a_file_that_goes_away_is_an_error_even_when_rows_may_be_left_out(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
        [shard] = list_shards(section(str(tmp_path / "a.jsonl")), "train")
        (tmp_path / "a.jsonl").unlink()
        with pytest.raises(DataError, match=r"a\.jsonl cannot be read"):
            list(read_documents(shard, lambda error: None))

    def test_a_parquet_row_that_is_not_utf8_does_not_take_its_neighbours_along(self, tmp_path):
        binary = pa.array([b"one", b"\xff\xfe", b"three"], pa.binary())
        pq.write_table(pa.table({"text": binary.view(pa.string())}), tmp_path / "a.parquet")
        [shard] = list_shards(section(str(tmp_path / "a.parquet")), "train")
        errors: list[DataError] = []
        assert [document.text for document in read_documents(shard, errors.append)] == ["one", "three"]
        [error] = errors
        assert f"{tmp_path / 'a.parquet'}, row group 0, row 1: the row cannot be decoded" in error.message

    def test_rows_are_numbered_through_a_row_group_of_any_size(self, tmp_path):
        rows = ["x"] * 3000
        rows[2500] = None
        pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
        assert "row group 0, row 2500: " in refusal(section(str(tmp_path / "a.parquet")))

    def test_a_file_that_only_is_called_parquet(self, tmp_path):
        (tmp_path / "a.parquet").write_text("text")
        assert f"{tmp_path / 'a.parquet'} is not a Parquet file" in refusal(section(str(tmp_path / "a.parquet")))


class TestFiles:
    def test_patterns_are_expanded_in_a_fixed_order_without_repeats(self, tmp_path):
        for name in ("b", "a", "c"):
            (tmp_path / f"{name}.txt").write_text(name)
        assert texts(section([str(tmp_path / "c.txt"), str(tmp_path / "*.txt")])) == ["c", "a", "b"]

    def test_uris(self, tmp_path):
        (tmp_path / "a.txt").write_text("local")
        assert texts(section((tmp_path / "a.txt").as_uri())) == ["local"]

    def test_another_file_system(self):
        import fsspec

        path = "memory://nexus-ray-test/a.jsonl"
        with fsspec.open(path, "w", encoding="utf-8") as file:
            file.write('{"text": "in memory"}\n')
        data = section("memory://nexus-ray-test/*.jsonl")
        assert texts(data) == ["in memory"]
        assert list_shards(data, "train")[0].path.startswith("memory://"), "a worker must find the file system"

    def test_shards_are_numbered_through_all_sources(self, tmp_path):
        for name in ("x", "y"):
            write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name * 600}] * 4)
        sources = {name: {"train": str(tmp_path / f"{name}.jsonl")} for name in ("y", "x")}
        shards = list_shards(DataSection.model_validate({"sources": sources, "shard_bytes": 1024}), "train")
        assert [shard.index for shard in shards] == list(range(6))
        assert [shard.source for shard in shards] == ["y"] * 3 + ["x"] * 3

    def test_only_the_named_sources_and_the_asked_split_are_listed(self, tmp_path):
        for name in ("a", "b", "c"):
            (tmp_path / f"{name}.txt").write_text(name)
        sources = {
            "one": {"train": f"{tmp_path}/a.txt", "heldout": f"{tmp_path}/b.txt"},
            "two": {"train": f"{tmp_path}/c.txt"},
        }
        data = DataSection.model_validate({"sources": sources})
        assert [shard.source for shard in list_shards(data, "train", ("two",))] == ["two"]
        assert [Path(shard.path).name for shard in list_shards(data, "heldout")] == ["b.txt"]

    def test_nothing_matches(self, tmp_path):
        message = refusal(section(str(tmp_path / "*.jsonl")))
        assert "data.sources.play.train: nothing matches" in message
        assert "working directory" in message

    def test_an_empty_file(self, tmp_path):
        (tmp_path / "a.jsonl").touch()
        assert f"{tmp_path / 'a.jsonl'} is empty" in refusal(section(str(tmp_path / "a.jsonl")))

    @pytest.mark.parametrize(("name", "kind"), [("a.csv", ".csv"), ("a.jsonl.gz", ".gz"), ("README", "no suffix")])
    def test_an_unknown_kind(self, tmp_path, name, kind):
        (tmp_path / name).write_text("x")
        message = refusal(section(str(tmp_path / name)))
        assert f"unknown kind ({kind})" in message
        assert ".jsonl, .txt, .parquet" in message

    @pytest.mark.parametrize("split", ["train", "heldout"])
    def test_a_held_out_file_must_not_be_trained_on_by_any_source(self, tmp_path, split):
        for name in ("a.train", "a.heldout", "b.train"):
            (tmp_path / f"{name}.txt").write_text(name)
        sources = {
            "a": {"train": f"{tmp_path}/a.train.txt", "heldout": f"{tmp_path}/a.heldout.txt"},
            "b": {"train": f"{tmp_path}/*.txt"},
        }
        data = DataSection.model_validate({"sources": sources})
        with pytest.raises(DataError, match=r"a\.heldout\.txt is also trained on"):
            list_shards(data, split)
