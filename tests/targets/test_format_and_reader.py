"""A target set read back is what was written, and a damaged one is never read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from nexus_ray.errors import ArtefactError
from nexus_ray.storage import read_json, sha256_file, write_json
from nexus_ray.targets.format import SCHEMA, Manifest, TargetFile, read_table, write_rows
from nexus_ray.targets.reader import TargetSet

LENGTH, K, ROUTER = 8, 3, 2 * 4  # tokens, kept probabilities, layers x experts


def columns(seed: int, source: str, rows: int, *, top: bool = True, router: bool = True) -> dict[str, list[Any]]:
    """Random rows, as numpy makes them; empty lists where there is no teacher."""
    generator = np.random.default_rng(seed)

    def teacher(present: bool, width: int, kind: type) -> list[Any]:
        values = (generator.standard_normal((rows, width)) * 8).astype(kind)
        return list(values) if present else [[]] * rows

    return {
        "source": [source] * rows,
        "input_ids": list(generator.integers(0, 4000, (rows, LENGTH)).astype(np.int32)),
        "num_tokens": generator.integers(2, LENGTH + 1, rows).astype(np.int32).tolist(),
        "top_ids": teacher(top, LENGTH * K, np.int32),
        "top_log_probs": teacher(top, LENGTH * K, np.float16),
        "tail_log_prob": teacher(top, LENGTH, np.float32),
        "router_logits": teacher(router, LENGTH * ROUTER, np.float16),
    }


FILES = {
    "a.parquet": columns(0, "play", 5),
    "b.parquet": columns(1, "prose", 4, router=False),
    "c.parquet": columns(2, "play", 3),
    "d.parquet": columns(3, "code", 2, top=False),
    "e.parquet": columns(4, "text", 2, top=False, router=False),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    files = []
    for name, values in FILES.items():
        path = tmp_path / name
        write_rows(path, values)
        rows, tokens = len(values["source"]), sum(values["num_tokens"])
        size, checksum = path.stat().st_size, sha256_file(path)
        files.append(
            TargetFile(
                name=name, source=values["source"][0], sequences=rows, tokens=tokens, bytes=size, sha256=checksum
            )
        )
    Manifest(
        base_fingerprint="f" * 64,
        tokenizer_sha256="0" * 64,
        vocabulary=4117,
        sequence_length=LENGTH,
        top_k=K,
        teacher_sources=("play", "prose"),
        files=tuple(files),
    ).save(tmp_path)
    return tmp_path


class TestReading:
    def test_rows_of_a_source_are_in_file_order(self, directory):
        rows = TargetSet.open(directory).rows("play")
        assert rows.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [2, 0], [2, 1], [2, 2]]

    def test_an_unknown_source_has_no_rows(self, directory):
        assert TargetSet.open(directory).rows("verse").shape == (0, 2)

    def test_values_come_back_in_the_asked_order(self, directory):
        rows = np.array([[2, 1], [0, 4], [0, 0], [2, 1]])
        batch = TargetSet.open(directory).read(rows)
        names = list(FILES)
        expected = {key: np.stack([FILES[names[file]][key][row] for file, row in rows]) for key in SCHEMA.names[1:]}
        assert batch.input_ids.dtype == torch.int64
        assert (batch.input_ids.numpy() == expected["input_ids"]).all()
        assert (batch.num_tokens.numpy() == expected["num_tokens"]).all()
        assert batch.top is not None
        assert (batch.top.ids.numpy() == expected["top_ids"].reshape(4, LENGTH, K)).all()
        assert batch.top.log_probs.dtype == torch.float32
        assert (batch.top.log_probs.numpy() == expected["top_log_probs"].reshape(4, LENGTH, K)).all()
        assert (batch.top.tail_log_prob.numpy() == expected["tail_log_prob"]).all()
        assert batch.router_logits is not None
        assert (batch.router_logits.float().numpy() == expected["router_logits"].reshape(4, LENGTH, ROUTER)).all()

    @pytest.mark.parametrize(
        ("file", "top", "router"), [(0, True, True), (1, True, False), (3, False, True), (4, False, False)]
    )
    def test_sources_hold_only_what_their_losses_need(self, directory, file, top, router):
        batch = TargetSet.open(directory).read(np.array([[file, 1], [file, 0]]))
        assert (batch.top is not None) == top
        assert (batch.router_logits is not None) == router

    def test_valid_marks_the_tokens(self, directory):
        batch = TargetSet.open(directory).read(TargetSet.open(directory).rows("play"))
        assert batch.valid.sum(1).tolist() == batch.num_tokens.tolist()
        assert (batch.valid.int().diff(dim=1) <= 0).all(), "padding is at the end"

    def test_targets_are_counted_without_the_first_token_of_each_sequence(self, directory):
        targets = TargetSet.open(directory)
        rows = targets.rows("play")
        assert targets.count_targets(rows) == int((targets.read(rows).num_tokens - 1).sum())
        assert targets.count_targets(rows[:0]) == 0


class TestManifest:
    def test_round_trip(self, directory):
        manifest = Manifest.load(directory)
        manifest.save(directory / "copy")
        assert Manifest.load(directory / "copy") == manifest

    def test_an_incomplete_set_is_not_read(self, directory):
        (directory / "manifest.json").unlink()
        with pytest.raises(ArtefactError, match="no target manifest") as caught:
            TargetSet.open(directory)
        assert "precompute" in (caught.value.hint or "")

    @pytest.mark.parametrize("change", [{"format_version": 2}, {"files": 3}, {"unknown": 1}, {"top_k": None}])
    def test_another_manifest_is_refused(self, directory, change):
        values = read_json(directory / "manifest.json", what="manifest", hint="-")
        write_json(directory / "manifest.json", values | change)
        with pytest.raises(ArtefactError):
            TargetSet.open(directory)

    def test_unknown_fields_are_refused_in_python_too(self):
        with pytest.raises(ValidationError):
            TargetFile(name="a", source="b", sequences=1, tokens=1, bytes=1, sha256="", size=1)


class TestDamage:
    def test_a_missing_file(self, directory):
        (directory / "c.parquet").unlink()
        with pytest.raises(ArtefactError, match=r"c\.parquet is missing"):
            TargetSet.open(directory)

    def test_a_cut_file(self, directory):
        path = directory / "c.parquet"
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ArtefactError, match=rf"c\.parquet has {size - 1} bytes, not {size}"):
            TargetSet.open(directory)

    def test_a_changed_byte_is_found_by_the_checksum(self, directory):
        TargetSet.open(directory).verify()
        path = directory / "c.parquet"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(ArtefactError, match=r"c\.parquet does not match its checksum"):
            TargetSet.open(directory).verify()

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 1000, b"PAR1" + b"\x00" * 100 + b"PAR1"])
    def test_what_is_no_parquet(self, tmp_path, content):
        (tmp_path / "a.parquet").write_bytes(content)
        with pytest.raises(ArtefactError, match="damaged"):
            read_table(tmp_path / "a.parquet")

    def test_no_file(self, tmp_path):
        with pytest.raises(ArtefactError, match="missing from the target set"):
            read_table(tmp_path / "a.parquet")

    @pytest.mark.parametrize("dropped", ["num_tokens", "router_logits"])
    def test_a_column_is_missing(self, tmp_path, dropped):
        table = pa.table(FILES["a.parquet"], schema=SCHEMA).drop_columns([dropped])
        pq.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(ArtefactError, match=dropped):
            read_table(tmp_path / "a.parquet")

    def test_a_column_of_another_type(self, tmp_path):
        values = FILES["a.parquet"] | {"num_tokens": ["many"] * 5}
        pq.write_table(pa.table(values), tmp_path / "a.parquet")
        with pytest.raises(ArtefactError):
            read_table(tmp_path / "a.parquet")


def test_a_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(pa.ArrowException):
        write_rows(tmp_path / "a.parquet", columns(0, "play", 5) | {"num_tokens": ["many"] * 5})
    assert list(tmp_path.iterdir()) == []


def test_the_same_rows_give_the_same_bytes(tmp_path):
    """Checksums are comparable between runs with any number of workers."""
    for name in ("a", "b"):
        write_rows(tmp_path / name, columns(0, "play", 50))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
