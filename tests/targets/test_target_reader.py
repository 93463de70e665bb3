"""A target set read back is what was written, sequence by sequence, in any order and from any place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from handmade_sets import (
    LENGTH,
    OUTPUTS,
    ROUTERS,
    SEPARATOR,
    Part,
    Row,
    make_header,
    random_parts,
    random_sequence,
    write_set,
)

from nexus_ray.targets.reading import reader
from nexus_ray.targets.reading.cache import TableCache
from nexus_ray.targets.reading.reader import TargetSet
from nexus_ray.targets.reading.shards import Shard

ALL = [(output, router) for output in OUTPUTS for router in ROUTERS]
HEADER = make_header()


def of(parts: list[Part], source: str) -> list[Row]:
    return [sequence for part in parts if part.source == source for sequence in part.sequences]


def leaves(value: Any) -> list[torch.Tensor]:
    """Tensors of decoded targets, in the order of their fields."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for inner in vars(value).values() if hasattr(inner, "__dict__") for tensor in leaves(inner)]


def one_by_one(decode: Callable[[dict[str, torch.Tensor]], Any], columns: list[dict[str, torch.Tensor]]) -> list[Any]:
    """Targets decoded a sequence at a time and joined."""
    return [torch.cat(tensors) for tensors in zip(*(leaves(decode(column)) for column in columns), strict=True)]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("output", "router"), ALL)
def test_what_was_written_is_read_in_the_asked_order(tmp_path, output, router, masked):
    header = make_header(output, router)
    seed = ALL.index((output, router)) + 100 * masked
    parts = random_parts(header, seed, masked=masked)
    write_set(tmp_path, header, parts)
    targets, stored = TargetSet.open(tmp_path), of(parts, "play")
    order = np.random.default_rng(seed).integers(0, len(stored), 12)
    batch = targets.read(targets.sequences("play")[order])
    wanted = [stored[index] for index in order]
    for row, sequence in enumerate(wanted):
        count = len(sequence.input_ids)
        assert batch.input_ids[row].tolist() == sequence.input_ids + [SEPARATOR] * (LENGTH - count)
        assert batch.loss_mask[row].tolist() == sequence.loss_mask + [False] * (LENGTH - count)
        assert batch.valid[row].tolist() == [True] * count + [False] * (LENGTH - count)
    assert (batch.input_ids.dtype, batch.loss_mask.dtype) == (torch.int64, torch.bool)
    assert batch.num_tokens.tolist() == [len(sequence.input_ids) for sequence in wanted]
    assert (batch.output is None) == (header.output is None)
    if header.output is not None:
        assert_equal(leaves(batch.output), one_by_one(header.output.decode, [sequence.output for sequence in wanted]))
    assert (batch.router is None) == (header.router is None)
    if header.router is not None:
        assert batch.router is not None
        assert (batch.router.layers, batch.router.every) == (header.router.layers, header.router.every)
        assert_equal(leaves(batch.router), one_by_one(header.router.decode, [sequence.router for sequence in wanted]))


def test_targets_line_up_with_the_positions_before_the_loss_mask(tmp_path):
    """Hidden states that say their own sequence and position, so that an entry in a wrong place shows."""
    header = make_header("hidden", "none")
    encoding, generator = header.output, np.random.default_rng(3)
    assert encoding is not None
    sequences = [random_sequence(header, generator, masked=True) for _ in range(6)]
    for number, sequence in enumerate(sequences):
        before = [position - 1 for position, counts in enumerate(sequence.loss_mask) if counts]
        states = torch.zeros(len(before), encoding.hidden_size)
        states[:, 0], states[:, 1] = number, torch.tensor(before, dtype=torch.float32)
        sequence.output = encoding.encode(states)
    write_set(tmp_path, header, [Part("play", sequences, router=False)])
    order = np.array([4, 0, 5])
    batch = TargetSet.open(tmp_path).read(order)
    said = torch.zeros(3, LENGTH, encoding.hidden_size, dtype=torch.bfloat16)
    said[:, :-1][batch.loss_mask[:, 1:]] = batch.output.hidden
    rows, positions = batch.loss_mask[:, 1:].nonzero(as_tuple=True)
    assert said[rows, positions, 0].tolist() == order[rows].tolist()
    assert said[rows, positions, 1].tolist() == positions.tolist()


def test_sequences_are_numbered_in_file_order_across_shards(tmp_path):
    write_set(tmp_path, HEADER, random_parts(HEADER))
    targets = TargetSet.open(tmp_path)
    assert targets.sequences("play").tolist() == [0, 1, 2, 3, 4, 9, 10, 11]
    assert targets.sequences("text").tolist() == [12, 13]
    assert targets.sequences("verse").tolist() == []
    assert targets.sequences("verse").dtype == np.int64


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("row_group_rows", [1, 2, 5])
def test_counts_need_no_targets_to_be_read(tmp_path, row_group_rows, statistics):
    header = make_header("topk", "selected")
    parts = random_parts(header, 5, masked=True)
    write_set(tmp_path, header, parts, row_group_rows=row_group_rows, statistics=statistics)
    targets = TargetSet.open(tmp_path)
    order = np.random.default_rng(1).permutation(14)
    rows = [(part, sequence) for part in parts for sequence in part.sequences]
    wanted = [rows[number] for number in order]
    assert targets.num_tokens(order).tolist() == [len(sequence.input_ids) for _, sequence in wanted]
    assert targets.num_targets(order).tolist() == [sequence.num_targets for _, sequence in wanted]
    stored = [len(range(0, len(s.input_ids), 3)) if part.router else 0 for part, s in wanted]
    assert targets.num_router_positions(order).tolist() == stored
    assert targets.num_tokens(order[:0]).tolist() == []
    assert targets._row_groups.held == 0


def test_sequences_that_are_alike_are_counted_from_the_footer_alone(tmp_path, monkeypatch):
    alike = [Row([1] * LENGTH, [False] + [True] * (LENGTH - 1)) for _ in range(6)]
    write_set(tmp_path, HEADER, [Part("text", alike, output=False, router=False)])
    targets = TargetSet.open(tmp_path)
    monkeypatch.setattr(type(targets.shards[0]), "_columns", None)
    assert targets.num_targets(np.arange(6)).tolist() == [LENGTH - 1] * 6


@pytest.mark.parametrize(
    ("source", "output", "router"), [("play", True, True), ("prose", True, False), ("text", False, False)]
)
def test_a_source_has_the_targets_that_its_losses_need(tmp_path, source, output, router):
    write_set(tmp_path, HEADER, random_parts(HEADER))
    targets = TargetSet.open(tmp_path)
    batch = targets.read(targets.sequences(source)[:2])
    assert ((batch.output is not None), (batch.router is not None)) == (output, router)


def test_tokens_can_be_read_without_the_teacher(tmp_path):
    write_set(tmp_path, HEADER, random_parts(HEADER))
    targets = TargetSet.open(tmp_path)
    batch = targets.read(targets.sequences("play"), teacher=False)
    with_teacher = targets.read(targets.sequences("play"))
    assert with_teacher.output is not None
    assert batch.output is None
    assert batch.router is None
    assert torch.equal(batch.input_ids, with_teacher.input_ids)
    assert torch.equal(batch.loss_mask, with_teacher.loss_mask)


def test_a_sequence_in_which_nothing_counts_has_no_targets(tmp_path):
    header = make_header("sampled", "none")
    hidden = Row([1, 2, 3], [False] * 3)
    hidden.output = {name: torch.zeros(0, width, dtype=torch.uint8) for name, width in header.output.widths().items()}
    write_set(tmp_path, header, [Part("play", [hidden], router=False)])
    batch = TargetSet.open(tmp_path).read(np.array([0]))
    assert batch.output.ids.shape == (0, 7)
    assert batch.loss_mask.sum() == 0


def test_sequences_with_and_without_targets_are_not_read_together(tmp_path):
    write_set(tmp_path, HEADER, random_parts(HEADER))
    targets = TargetSet.open(tmp_path)
    with pytest.raises(ValueError, match=r"of one source at a time, not of \['play', 'text'\]"):
        targets.read(np.array([0, 13]))


@pytest.mark.parametrize("number", [-1, 14])
def test_there_is_no_sequence_beyond_the_last(tmp_path, number):
    write_set(tmp_path, HEADER, random_parts(HEADER))
    with pytest.raises(ValueError, match="has sequences 0 to 13"):
        TargetSet.open(tmp_path).read(np.array([number]))


def test_a_batch_moves_to_a_device_as_a_whole(tmp_path):
    write_set(tmp_path, HEADER, random_parts(HEADER))
    batch = TargetSet.open(tmp_path).read(np.array([0, 1])).to(torch.device("meta"))
    tensors = [batch.input_ids, batch.num_tokens, batch.loss_mask, batch.valid]
    tensors += leaves(batch.output) + leaves(batch.router)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


class TestPlaces:
    def test_a_set_behind_a_uri_is_read_like_a_local_one(self, tmp_path):
        write_set(tmp_path, HEADER, random_parts(HEADER))
        memory = fsspec.filesystem("memory")
        memory.put(f"{tmp_path}/", "/bucket/targets", recursive=True)
        local, remote = TargetSet.open(tmp_path), TargetSet.open("memory://bucket/targets")
        remote.verify()
        for source in ("play", "prose", "text"):
            left, right = (targets.read(targets.sequences(source)) for targets in (local, remote))
            assert torch.equal(left.input_ids, right.input_ids)
            if left.output is not None:
                assert_equal(leaves(left.output), leaves(right.output))
        memory.rm("/bucket", recursive=True)

    def test_shards_in_a_store_are_counted_at_once(self, tmp_path, monkeypatch):
        """Each is opened while the others are: a store takes its time for each answer."""
        write_set(tmp_path, HEADER, random_parts(HEADER))
        memory = fsspec.filesystem("memory")
        memory.put(f"{tmp_path}/", "/bucket/counted", recursive=True)
        local, remote = TargetSet.open(tmp_path), TargetSet.open("memory://bucket/counted")
        numbers, together, open_shard = local.sequences("play"), threading.Barrier(2), Shard._open
        expected = local.num_targets(numbers)
        monkeypatch.setattr(Shard, "_open", lambda shard: (together.wait(30), open_shard(shard))[1])
        assert (remote.num_targets(numbers) == expected).all()
        memory.rm("/bucket", recursive=True)

    def test_a_file_uri_is_a_place_too(self, tmp_path):
        write_set(tmp_path, HEADER, random_parts(HEADER))
        assert len(TargetSet.open(f"file://{tmp_path}").read(np.array([3])).input_ids) == 1

    def test_a_path_with_odd_characters_is_just_a_path(self, tmp_path):
        odd = tmp_path / "a::b [c]* ü?"
        write_set(odd, HEADER, random_parts(HEADER))
        TargetSet.open(odd).verify()


class TestMemory:
    def test_row_groups_stay_within_the_cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(reader, "CACHE_BYTES", 4096)
        write_set(tmp_path, HEADER, random_parts(HEADER))
        targets = TargetSet.open(tmp_path)
        for _ in range(3):
            for number in targets.sequences("play"):
                targets.read(np.array([number]))
                assert 0 < targets._row_groups.held <= 4096

    def test_the_least_recently_used_goes_first_and_what_is_too_large_is_not_kept(self):
        def table(count: int) -> pa.Table:
            return pa.table({"x": np.zeros(count, dtype=np.uint8)})

        cache: TableCache[str] = TableCache(100)
        loaded: list[str] = []

        def get(key: str, count: int) -> None:
            def load() -> pa.Table:
                loaded.append(key)
                return table(count)

            assert len(cache.get(key, load)) == count

        for key in ("a", "b", "a", "c", "a", "b"):
            get(key, 40)
        assert loaded == ["a", "b", "c", "b"]
        get("most", 90)
        assert cache.held == 90
        get("b", 10)
        assert cache.held == 100
        get("too large", 101)
        assert cache.held == 0
        assert loaded[4:] == ["most", "b", "too large"]

    def test_only_some_footers_are_kept(self, tmp_path, monkeypatch):
        monkeypatch.setattr(reader, "_OPEN_SHARDS", 2)
        write_set(tmp_path, HEADER, random_parts(HEADER))
        targets = TargetSet.open(tmp_path)
        expected = [int(targets.num_tokens(np.array([number]))[0]) for number in range(14)]
        assert sum(shard._parquet is not None for shard in targets.shards) == 2
        assert [int(targets.read(np.array([number])).num_tokens[0]) for number in range(14)] == expected

    def test_a_row_group_is_read_once_for_all_its_sequences(self, tmp_path, monkeypatch):
        write_set(tmp_path, HEADER, random_parts(HEADER), row_group_rows=5)
        targets = TargetSet.open(tmp_path)
        shard = targets.shards[0]
        calls: list[int] = []
        read = shard.read
        monkeypatch.setattr(shard, "read", lambda group, **options: calls.append(group) or read(group, **options))
        targets.read(np.array([4, 0, 2]))
        assert calls == [0]


def test_threads_may_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CACHE_BYTES", 4096)
    monkeypatch.setattr(reader, "_OPEN_SHARDS", 1)
    write_set(tmp_path, HEADER, random_parts(HEADER))
    reference, targets = TargetSet.open(tmp_path), TargetSet.open(tmp_path)
    play = targets.sequences("play")
    expected = {int(number): reference.read(np.array([number])).input_ids for number in play}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for number in np.random.default_rng(seed).choice(play, 60):
            batch = targets.read(np.array([number]))
            if not torch.equal(batch.input_ids, expected[int(number)]):
                wrong.append(int(number))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_relative_path_is_understood(tmp_path, monkeypatch):
    write_set(tmp_path / "set", HEADER, random_parts(HEADER))
    monkeypatch.chdir(tmp_path)
    assert len(TargetSet.open(Path("set")).sequences("play")) == 8
