"""Checksums of a shard: one of the whole file, and one a block, so that a reader can check just the bytes it reads.

A CRC-32 finds every change of up to 32 bits in a row, so no single byte of a block can change unseen. It is no defence
against somebody who wants to deceive; the SHA-256 of the whole file is.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable
from pathlib import Path

from nexus_ray.errors import ArtefactError
from nexus_ray.targets.format import REMAKE

BLOCK_BYTES = 1 << 18
MAKE_AGAIN = f"delete it and {REMAKE}: only this shard is made again"
_VERIFIED_BYTES = 32 * BLOCK_BYTES  # of one request when all of a file is read
_DIGITS = 8  # hexadecimal, of a CRC-32

ReadRange = Callable[[int, int], bytes]


def checksums(path: Path) -> tuple[str, str]:
    """SHA-256 of a file, and the CRC-32 (as zlib has it) of each of its blocks, eight hexadecimal digits a block."""
    sha256, blocks = hashlib.sha256(), []
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            sha256.update(block)
            blocks.append(_crc(block))
    return sha256.hexdigest(), "".join(blocks)


def block_digits(size: int) -> int:
    """Digits of the block checksums of a file of `size` bytes."""
    return _DIGITS * -(-size // BLOCK_BYTES)


class CheckedBytes:
    """Bytes of a file by range; each block is compared with its checksum when one of its bytes is first read.

    Args:
        place: of the file, for messages.
        read: gives the bytes of a range, fewer where the file ends before.
        size: bytes of the file.
        blocks: as `checksums` gives them.
    """

    def __init__(self, place: str, read: ReadRange, size: int, blocks: str) -> None:
        self.place = place
        self.size = size
        self._read = read
        self._blocks = blocks
        self._passed = bytearray(len(blocks) // _DIGITS)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), which must lie inside the file.

        Raises:
            ArtefactError: a byte in their blocks is not what was written, or the file ends too soon.
            StorageError: they cannot be read.
        """
        first, last = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
        if all(self._passed[first:last]):
            return self._whole(start, stop)
        begin = first * BLOCK_BYTES
        content = self._whole(begin, min(last * BLOCK_BYTES, self.size))
        for block in range(first, last):
            offset = block * BLOCK_BYTES - begin
            self._compare(block, memoryview(content)[offset : offset + BLOCK_BYTES])
        return content[start - begin : stop - begin]

    def verify(self, sha256: str, advance: Callable[[int], None]) -> None:
        """Read the file from its beginning to its end and compare every block and the whole.

        Args:
            sha256: of the whole file.
            advance: called with the number of bytes that were compared.

        Raises:
            ArtefactError: they do not agree.
            StorageError: it cannot be read.
        """
        self._passed = bytearray(len(self._passed))
        found = hashlib.sha256()
        for start in range(0, self.size, _VERIFIED_BYTES):
            content = self.read(start, min(start + _VERIFIED_BYTES, self.size))
            found.update(content)
            advance(len(content))
        if found.hexdigest() != sha256:
            raise ArtefactError(f"{self.place} has SHA-256 {found.hexdigest()}, not {sha256}", MAKE_AGAIN)

    def _whole(self, start: int, stop: int) -> bytes:
        content = self._read(start, stop)
        if len(content) != stop - start:
            raise ArtefactError(f"{self.place} is cut off: it ends at byte {start + len(content):,}", MAKE_AGAIN)
        return content

    def _compare(self, block: int, content: memoryview) -> None:
        if self._passed[block]:
            return
        found, expected = _crc(content), self._blocks[block * _DIGITS : (block + 1) * _DIGITS]
        if found != expected:
            begin = block * BLOCK_BYTES
            where = f"bytes {begin:,} to {begin + len(content):,}"
            raise ArtefactError(f"{self.place} is damaged: {where} have CRC-32 {found}, not {expected}", MAKE_AGAIN)
        self._passed[block] = 1


class VerifiedFile(io.RawIOBase):
    """Checked bytes as a file object, for libraries that read files.

    Args:
        content: of the file; many file objects may share it.
    """

    def __init__(self, content: CheckedBytes) -> None:
        self._content = content
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to `offset` bytes from the beginning, the position or the end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._content.size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes, or all that are left.

        Raises:
            ArtefactError, StorageError: as `CheckedBytes.read`.
        """
        left = max(0, self._content.size - self._position)
        count = left if size is None or size < 0 else min(size, left)
        content = self._content.read(self._position, self._position + count) if count else b""
        self._position += count
        return content

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        """Read into a buffer."""
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _crc(content: bytes | memoryview) -> str:
    return f"{zlib.crc32(content):08x}"
