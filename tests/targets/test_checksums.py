"""Checksums by block: equal to zlib's and hashlib's, checked once, and no changed byte gets past them."""

from __future__ import annotations

import hashlib
import io
import zlib
from pathlib import Path

import numpy as np
import pytest

from nexus_ray.errors import ArtefactError
from nexus_ray.targets.checksums import BLOCK_BYTES, CheckedBytes, VerifiedFile, block_digits, checksums

CONTENT = np.random.default_rng(0).bytes(2 * BLOCK_BYTES + 1234)


class Recorder:
    """Reads ranges of some bytes and remembers which."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.ranges: list[tuple[int, int]] = []

    def __call__(self, start: int, stop: int) -> bytes:
        self.ranges.append((start, stop))
        return self.content[start:stop]


def blocks_of(content: bytes) -> str:
    starts = range(0, len(content), BLOCK_BYTES)
    return "".join(format(zlib.crc32(content[start : start + BLOCK_BYTES]), "08x") for start in starts)


def checked(content: bytes, original: bytes = CONTENT) -> tuple[CheckedBytes, Recorder]:
    recorder = Recorder(content)
    return CheckedBytes("a.parquet", recorder, len(original), blocks_of(original)), recorder


def changed(position: int) -> bytes:
    content = bytearray(CONTENT)
    content[position] ^= 1 << (position % 8)
    return bytes(content)


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES + 1234])
def test_checksums_are_those_of_hashlib_and_zlib(tmp_path: Path, size: int):
    (tmp_path / "file").write_bytes(CONTENT[:size])
    assert checksums(tmp_path / "file") == (hashlib.sha256(CONTENT[:size]).hexdigest(), blocks_of(CONTENT[:size]))
    assert len(checksums(tmp_path / "file")[1]) == block_digits(size)


@pytest.mark.parametrize("seed", range(5))
def test_any_range_is_read_as_it_is(seed):
    content, _ = checked(CONTENT)
    generator = np.random.default_rng(seed)
    for start, stop in np.sort(generator.integers(0, len(CONTENT) + 1, (20, 2)), axis=1):
        assert content.read(int(start), int(stop)) == CONTENT[start:stop]


def test_a_block_is_read_whole_the_first_time_and_never_again():
    content, recorder = checked(CONTENT)
    content.read(10, 20)
    content.read(30, 40)
    content.read(BLOCK_BYTES - 1, BLOCK_BYTES + 1)
    content.read(BLOCK_BYTES + 5, BLOCK_BYTES + 6)
    content.read(len(CONTENT) - 1, len(CONTENT))
    assert recorder.ranges == [
        (0, BLOCK_BYTES),
        (30, 40),
        (0, 2 * BLOCK_BYTES),
        (BLOCK_BYTES + 5, BLOCK_BYTES + 6),
        (2 * BLOCK_BYTES, len(CONTENT)),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_a_changed_byte_is_found_whichever_byte_of_its_block_is_read(seed):
    generator = np.random.default_rng(seed)
    position = int(generator.integers(len(CONTENT)))
    begin = position // BLOCK_BYTES * BLOCK_BYTES
    end = min(begin + BLOCK_BYTES, len(CONTENT))
    content, _ = checked(changed(position))
    start = int(generator.integers(begin, end))
    with pytest.raises(ArtefactError) as caught:
        content.read(start, start + 1)
    assert f"a.parquet is damaged: bytes {begin:,} to {end:,}" in caught.value.message
    assert "only this shard is made again" in str(caught.value.hint)


def test_a_damaged_block_stays_damaged_and_the_others_can_be_read():
    content, _ = checked(changed(BLOCK_BYTES + 7))
    for _ in range(2):
        with pytest.raises(ArtefactError):
            content.read(BLOCK_BYTES, BLOCK_BYTES + 1)
    assert content.read(0, 10) == CONTENT[:10]


def test_a_file_that_has_become_shorter_says_where_it_ends():
    content, _ = checked(CONTENT[:-100])
    with pytest.raises(ArtefactError, match=f"is cut off: it ends at byte {len(CONTENT) - 100:,}"):
        content.read(len(CONTENT) - 8, len(CONTENT))


class TestVerifying:
    def test_an_unchanged_file_passes_and_every_byte_counts_as_progress(self):
        content, recorder = checked(CONTENT)
        seen: list[int] = []
        content.verify(hashlib.sha256(CONTENT).hexdigest(), seen.append)
        assert sum(seen) == len(CONTENT)
        content.read(5, 9)
        assert recorder.ranges[-1] == (5, 9), "blocks that passed are not read again"

    def test_blocks_that_passed_before_are_compared_again(self):
        content, recorder = checked(CONTENT)
        content.read(0, len(CONTENT))
        recorder.content = changed(3)
        with pytest.raises(ArtefactError, match="bytes 0 to 262,144"):
            content.verify(hashlib.sha256(CONTENT).hexdigest(), lambda _: None)

    def test_a_change_that_all_blocks_agree_with_is_found_by_the_sha256(self):
        other = changed(9)
        content, _ = checked(other, original=other)
        with pytest.raises(ArtefactError, match="has SHA-256"):
            content.verify(hashlib.sha256(CONTENT).hexdigest(), lambda _: None)


@pytest.mark.parametrize("seed", range(5))
def test_the_file_object_behaves_like_one_in_memory(seed):
    reference, file = io.BytesIO(CONTENT), VerifiedFile(checked(CONTENT)[0])
    generator = np.random.default_rng(seed)
    for _ in range(30):
        whence = int(generator.integers(3))
        low, high = {0: (0, len(CONTENT)), 1: (0, 1000), 2: (-len(CONTENT), 1)}[whence]
        offset, size = int(generator.integers(low, high)), int(generator.integers(-1, 5000))
        assert file.seek(offset, whence) == reference.seek(offset, whence)
        assert file.read(size) == reference.read(size)
        assert file.tell() == reference.tell()
    file.seek(0)
    assert io.BufferedReader(file).read() == CONTENT
