"""A damaged, incomplete or foreign target set is never read: the error names the file, the place and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade_sets import (
    Part,
    file_identity,
    make_header,
    random_parts,
    random_sequence,
    save_manifest,
    write_set,
    write_shard,
)

from nexus_ray.errors import ArtefactError, NexusError, StorageError
from nexus_ray.targets.encoding.encodings import HiddenEncoding
from nexus_ray.targets.format import Manifest
from nexus_ray.targets.reading.reader import TargetSet

HEADER = make_header()
BLOCK = 2**18


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_set(tmp_path / "set", HEADER, random_parts(HEADER))
    return tmp_path / "set"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of several blocks: hidden states, 48 KiB a sequence."""
    header = make_header("hidden", "none").model_copy(update={"output": HiddenEncoding(hidden_size=1536)})
    generator = np.random.default_rng(0)
    part = Part("play", [random_sequence(header, generator) for _ in range(60)], router=False)
    path = tmp_path_factory.mktemp("large")
    write_set(path, header, [part], row_group_rows=5)
    assert (path / "a.parquet").stat().st_size > 3 * BLOCK
    return path


def read_everything(directory: Path | str) -> None:
    """Every sequence of every source, without `verify`."""
    targets = TargetSet.open(directory)
    for source in dict.fromkeys(file.source for file in targets.manifest.files):
        targets.read(targets.sequences(source))


def error_of(directory: Path | str, kind: type[NexusError] = ArtefactError) -> NexusError:
    with pytest.raises(kind) as caught:
        read_everything(directory)
    return caught.value


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << position % 8]))


def change_manifest(directory: Path, **changes: Any) -> None:
    values = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(values | changes))


class TestFlippedBytes:
    def test_every_byte_of_a_small_shard_matters_to_verify_and_to_reading(self, tmp_path):
        header = make_header("none", "none")
        write_set(tmp_path, header, random_parts(header)[3:])
        path = tmp_path / "a.parquet"
        for position in range(path.stat().st_size):
            flip(path, position)
            targets = TargetSet.open(tmp_path)
            for look in (targets.verify, lambda targets=targets: targets.read(np.array([0]))):
                with pytest.raises(ArtefactError, match=r"a\.parquet is damaged: bytes 0 to "):
                    look()
            flip(path, position)
        TargetSet.open(tmp_path).verify()
        read_everything(tmp_path)

    @pytest.mark.parametrize("seed", range(10))
    def test_a_random_byte_of_a_large_shard_is_found_with_the_bytes_of_its_block(self, large, tmp_path, seed):
        shutil.copytree(large, tmp_path / "set")
        path = tmp_path / "set" / "a.parquet"
        position = int(np.random.default_rng(seed).integers(path.stat().st_size))
        flip(path, position)
        begin, end = position // BLOCK * BLOCK, min((position // BLOCK + 1) * BLOCK, path.stat().st_size)
        with pytest.raises(ArtefactError, match=f"bytes {begin:,} to {end:,} have CRC-32"):
            TargetSet.open(tmp_path / "set").verify()
        error = error_of(tmp_path / "set")
        assert f"a.parquet is damaged: bytes {begin:,} to {end:,} have CRC-32" in error.message
        assert error.hint == "delete it and run `nexus-ray precompute CONFIG`: only this shard is made again"

    def test_sequences_in_other_blocks_can_be_read(self, large, tmp_path):
        shutil.copytree(large, tmp_path / "set")
        flip(tmp_path / "set" / "a.parquet", 2 * BLOCK + 5)
        targets = TargetSet.open(tmp_path / "set")
        targets.read(np.array([0, 1, 2]))
        with pytest.raises(ArtefactError, match="bytes 524,288 to 786,432"):
            targets.read(np.arange(60))
        targets.read(np.array([3, 4]))

    def test_one_behind_a_uri_is_found_too(self, directory):
        flip(directory / "c.parquet", 700)
        memory = fsspec.filesystem("memory")
        memory.put(f"{directory}/", "/flipped/set", recursive=True)
        assert "memory://flipped/set/c.parquet is damaged" in error_of("memory://flipped/set").message
        memory.rm("/flipped", recursive=True)


class TestFilesThatAreNotThere:
    def test_a_missing_shard_is_named_when_the_set_is_opened(self, directory):
        (directory / "b.parquet").unlink()
        with pytest.raises(ArtefactError, match=r"set/b\.parquet is missing") as caught:
            TargetSet.open(directory)
        assert caught.value.hint == "run `nexus-ray precompute CONFIG`: only this shard is made again"

    @pytest.mark.parametrize("size", [0, 3, 500])
    def test_a_cut_shard_is_named_with_both_sizes(self, directory, size):
        path = directory / "b.parquet"
        whole = path.read_bytes()
        path.write_bytes(whole[:size])
        with pytest.raises(ArtefactError, match=rf"b\.parquet has {size} bytes, not {len(whole):,}"):
            TargetSet.open(directory)

    def test_a_shard_that_is_a_directory_is_missing(self, directory):
        (directory / "b.parquet").unlink()
        (directory / "b.parquet").mkdir()
        assert "b.parquet is missing" in error_of(directory).message

    def test_a_shard_that_vanishes_later_is_named(self, directory):
        targets = TargetSet.open(directory)
        (directory / "c.parquet").unlink()
        with pytest.raises(StorageError, match=r"c\.parquet cannot be read"):
            targets.read(targets.sequences("play"))

    def test_a_shard_that_shrinks_later_is_cut_off(self, directory):
        targets = TargetSet.open(directory)
        path = directory / "c.parquet"
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ArtefactError, match=r"c\.parquet is cut off"):
            targets.read(targets.sequences("play"))

    @pytest.mark.parametrize("place", ["missing", "memory://nothing/here"])
    def test_a_place_without_a_manifest_is_no_target_set(self, tmp_path, place):
        error = error_of(place if "://" in place else tmp_path / place)
        assert "no target manifest at" in error.message
        assert "precompute" in (error.hint or "")

    def test_an_unknown_kind_of_uri_is_named(self):
        assert "nothing://a/b cannot be opened" in error_of("nothing://a/b", StorageError).message


class TestOtherRuns:
    def test_two_shards_of_one_source_that_changed_places_are_found(self, directory):
        first, second = directory / "a.parquet", directory / "c.parquet"
        first.rename(directory / "x")
        second.rename(first)
        (directory / "x").rename(second)
        assert "a.parquet has" in error_of(directory).message

    def test_two_shards_of_one_size_that_changed_places_are_found(self, tmp_path):
        generator = np.random.default_rng(0)
        header = make_header("none", "none", sequence_length=4)
        parts = [Part("play", [random_sequence(header, generator)], False, False) for _ in range(2)]
        for token, part in enumerate(parts):
            part.sequences[0].input_ids, part.sequences[0].loss_mask = [token] * 4, [False] * 4
        write_set(tmp_path, header, parts)
        contents = [(tmp_path / name).read_bytes() for name in ("a.parquet", "b.parquet")]
        assert len(contents[0]) == len(contents[1])
        (tmp_path / "a.parquet").write_bytes(contents[1])
        (tmp_path / "b.parquet").write_bytes(contents[0])
        assert "a.parquet is damaged" in error_of(tmp_path).message

    @pytest.mark.parametrize(
        ("other", "difference"),
        [
            (make_header(base_fingerprint="c" * 64), f'header.base_fingerprint is "{"c" * 39}..., the manifest says'),
            (make_header(tokenizer_sha256="d" * 64), "header.tokenizer_sha256 is"),
            (make_header("hidden"), 'header.output.mode is "hidden", the manifest says "topk"'),
            (make_header("none"), "header.output.mode is absent"),
            (make_header(router="selected"), 'header.router.mode is "selected", the manifest says "logits"'),
            (make_header(separator=7), "header.separator is 7, the manifest says 49"),
        ],
    )
    @pytest.mark.parametrize("listed", [True, False])
    def test_a_shard_of_another_run_is_told_by_the_first_field_that_differs(self, directory, other, difference, listed):
        """Whether its checksums are in the manifest, as after a merge by hand, or not."""
        part = random_parts(other)[0]
        write_shard(directory / "a.parquet", other, Part("play", part.sequences))
        if listed:
            values = json.loads((directory / "manifest.json").read_text())
            first = values["files"][0] | file_identity(directory / "a.parquet")
            change_manifest(directory, files=[first, *values["files"][1:]])
        error = error_of(directory)
        assert "is of another run than the manifest" in error.message
        assert difference in error.message

    def test_a_shard_of_another_source_is_told(self, directory):
        values = json.loads((directory / "manifest.json").read_text())
        change_manifest(directory, files=[values["files"][0] | {"source": "verse"}, *values["files"][1:]])
        assert 'source is "play", the manifest says "verse"' in error_of(directory).message

    def test_the_manifest_of_another_run_is_refused(self, directory, tmp_path):
        """The same names, as of a set that was copied over another."""
        other = make_header(compute={"device": "cuda", "dtype": "bfloat16", "experts": "reference"})
        write_set(tmp_path / "other", other, random_parts(other, seed=1))
        shutil.copy(tmp_path / "other" / "manifest.json", directory)
        assert 'header.compute.device is "cpu", the manifest says "cuda"' in error_of(directory).message

    def test_a_damaged_description_is_damage_first(self, directory):
        path = directory / "a.parquet"
        flip(path, path.read_bytes().index(b"separator"))
        assert "a.parquet is damaged" in error_of(directory).message

    def test_parquet_that_describes_nothing_is_refused(self, directory):
        pq.write_table(pa.table({"x": [1]}), directory / "a.parquet")
        values = json.loads((directory / "manifest.json").read_text())
        first = values["files"][0] | file_identity(directory / "a.parquet")
        change_manifest(directory, files=[first, *values["files"][1:]])
        message = error_of(directory).message
        assert message.endswith("a.parquet is of another run than the manifest: it does not describe itself")

    def test_another_base_model_is_refused_with_both_identities(self, directory):
        TargetSet.open(directory, base_fingerprint="b" * 64, tokenizer_sha256="a" * 64)
        with pytest.raises(ArtefactError, match=f"made with the base model {'b' * 12}, not {'e' * 12}"):
            TargetSet.open(directory, base_fingerprint="e" * 64)

    def test_another_tokenizer_is_refused_with_both_identities(self, directory):
        with pytest.raises(ArtefactError, match=f"made with the tokenizer {'a' * 12}, not {'e' * 12}"):
            TargetSet.open(directory, tokenizer_sha256="e" * 64)

    def test_text_alone_is_of_no_base_model(self, tmp_path):
        header = make_header("none", "none", base_fingerprint=None, compute=None)
        write_set(tmp_path, header, random_parts(header))
        TargetSet.open(tmp_path, base_fingerprint="e" * 64, tokenizer_sha256="a" * 64)


class TestManifests:
    @pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000, "\x00", '{"format_version": 2}'])
    def test_what_is_no_manifest_is_refused(self, directory, content):
        (directory / "manifest.json").write_text(content)
        assert "manifest.json is not" in error_of(directory).message

    def test_another_format_is_refused_with_both_numbers(self, directory):
        change_manifest(directory, format_version=1)
        assert "is of target format 1, not 2" in error_of(directory).message

    @pytest.mark.parametrize("change", [{"files": 3}, {"unknown": 1}, {"vocabulary": None}, {"output": {"mode": "x"}}])
    def test_fields_of_another_kind_are_refused(self, directory, change):
        change_manifest(directory, **change)
        assert "is not a target manifest" in error_of(directory).message

    @pytest.mark.parametrize(
        "change", [{"name": "../set/a.parquet"}, {"blocks": ""}, {"blocks": "0" * 16}, {"name": "x/y"}]
    )
    def test_a_file_outside_the_set_or_without_its_checksums_is_refused(self, directory, change):
        values = json.loads((directory / "manifest.json").read_text())
        change_manifest(directory, files=[values["files"][0] | change, *values["files"][1:]])
        assert "describes no shard" in error_of(directory).message


class TestShardsThatKeepTheirChecksums:
    """Nothing was damaged, but whoever wrote the file did not follow the format."""

    def relist(self, directory: Path, **changes: object) -> None:
        manifest = Manifest.model_validate_json((directory / "manifest.json").read_text())
        first = manifest.files[0].model_copy(update=file_identity(directory / "a.parquet") | changes)
        save_manifest(directory, manifest.model_copy(update={"files": (first, *manifest.files[1:])}))

    def rewrite(self, directory: Path, table: pa.Table) -> None:
        pq.write_table(table, directory / "a.parquet", row_group_size=2)
        self.relist(directory)

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 1000, b"PAR1" + b"\x00" * 100 + b"PAR1"])
    def test_what_is_no_parquet(self, directory, content):
        (directory / "a.parquet").write_bytes(content)
        self.relist(directory)
        assert "a.parquet is no Parquet file of targets" in error_of(directory).message

    def test_a_column_is_missing(self, directory):
        self.rewrite(directory, pq.read_table(directory / "a.parquet").drop_columns(["top_ids"]))
        error = error_of(directory).message
        assert "a.parquet has the columns" in error
        assert error.count("top_ids") == 1

    def test_a_column_is_of_another_type(self, directory):
        table = pq.read_table(directory / "a.parquet")
        index = table.schema.get_field_index("num_tokens")
        column = table["num_tokens"].cast(pa.int64())
        self.rewrite(directory, table.set_column(index, "num_tokens", column))
        assert "num_tokens int64" in error_of(directory).message

    def test_rows_are_missing(self, directory):
        self.rewrite(directory, pq.read_table(directory / "a.parquet").slice(0, 4))
        assert "a.parquet has 4 sequences, the manifest says 5" in error_of(directory).message

    def test_a_sequence_with_targets_of_another_number_of_positions(self, directory):
        table = pq.read_table(directory / "a.parquet")
        index = table.schema.get_field_index("top_values")
        values = table["top_values"].to_pylist()
        values[3] += b"\x00"
        self.rewrite(directory, table.set_column(index, "top_values", pa.array(values)))
        error = error_of(directory).message
        assert f"sequence play/{'0' * 16}/3 has {len(values[3])} bytes of top_values, not" in error
