"""The safetensors header, read strictly and written as the safetensors library writes it.

A file is 8 bytes of little-endian header length, that many bytes of JSON `{name: {dtype, shape, data_offsets}}`
with an optional `__metadata__` object of strings, and the tensors' bytes back to back
(https://github.com/huggingface/safetensors, "Format"). The library only maps files into memory; parsing the header
here allows positioned reads and remote files. What the library refuses is refused, and so are duplicate names,
unknown fields and anything that would cost far more memory than the header has bytes.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nexus_ray.checkpoints.byte_files import ByteFile
from nexus_ray.errors import ModelError

# In the order in which the library lays out the tensors of a file, last first.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # the library's limit
_MOST_DIGITS = 19  # of 2^63 - 1
_MOST_DIMENSIONS = 64
_MOST_BYTES = 2**63 - 1
_BYTES_PER_BRACKET = 16  # the shortest entry of a tensor takes 50 bytes and opens three brackets


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor in a file will be.

    Attributes:
        name: its name.
        dtype: element type; one of `DTYPES`.
        shape: sizes; () for a scalar.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return _product(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorEntry:
    """What a tensor in a file is.

    Attributes:
        name: its name.
        dtype: element type.
        shape: sizes; () for a scalar.
        start: first byte of its data, from the beginning of the file.
        stop: byte after its last.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A file's tensors by name, and its free-form metadata."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


class _DamagedError(Exception):
    """Why a header is refused."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of an element type in a header, e.g. "BF16"."""
    return _NAMES[dtype]


def read_header(file: ByteFile) -> Header:
    """Read and check the header of a safetensors file; the tensors' bytes are not touched.

    Raises:
        ModelError: it is not a safetensors file, or a damaged one; names the file, the tensor and what is wrong.
    """
    try:
        text = _read_text(file)
        values = _parse(text)
        metadata = _check_metadata(values.pop(METADATA, {}))
        data_start = _LENGTH_BYTES + len(text)
        entries = {name: _entry(name, value, data_start) for name, value in values.items()}
        _check_coverage(entries.values(), data_start, file.size)
    except _DamagedError as error:
        raise ModelError(f"{file.location} is damaged: {error}", "download the model again") from error
    return Header(entries, metadata)


def lay_out(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, list[TensorEntry]]:
    """The first bytes of a file (length and header, padded to 8) and where each tensor goes, without gaps.

    The widest element types come first, so that every tensor is aligned, and then names in order: as the library
    does it, to the byte.
    """
    ordered = sorted(specs, key=lambda spec: (-_RANK[spec.dtype], spec.name))
    values: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    starts: list[int] = []
    position = 0
    for spec in ordered:
        starts.append(position)
        position += spec.nbytes
        offsets = [starts[-1], position]
        values[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    begin = _LENGTH_BYTES + len(text)
    entries = [
        TensorEntry(spec.name, spec.dtype, spec.shape, begin + start, begin + start + spec.nbytes)
        for spec, start in zip(ordered, starts, strict=True)
    ]
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, entries


def _read_text(file: ByteFile) -> bytes:
    if file.size < _LENGTH_BYTES:
        raise _DamagedError(f"it has {file.size} bytes, too few for a safetensors file")
    length = int.from_bytes(file.read(0, _LENGTH_BYTES).numpy().tobytes(), "little")
    if length > file.size - _LENGTH_BYTES:
        raise _DamagedError(f"its header claims {length} bytes, the file has {file.size}")
    if length > _MOST_HEADER_BYTES:
        raise _DamagedError(f"its header claims {length} bytes, more than {_MOST_HEADER_BYTES}")
    return file.read(_LENGTH_BYTES, _LENGTH_BYTES + length).numpy().tobytes()


def _parse(text: bytes) -> dict[str, Any]:
    """The header as Python objects, none of which can be much larger than its text."""
    if not text.startswith(b"{"):
        raise _DamagedError("its header is not a JSON object")
    if text.count(b"[") + text.count(b"{") > len(text) // _BYTES_PER_BRACKET + 4:
        raise _DamagedError("its header has more brackets than tensors can have")
    try:
        values: dict[str, Any] = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError) as error:
        raise _DamagedError(f"its header is not JSON: {_short(str(error))}") from error
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise _DamagedError(f"its header names {_short(twice)} twice")
    return values


def _integer(digits: str) -> int:
    if digits.startswith("-") or len(digits) > _MOST_DIGITS:
        raise _DamagedError(f"its header has the number {_short(digits)}, which is no size")
    return int(digits)


def _no_number(digits: str) -> None:
    raise _DamagedError(f"its header has the number {_short(digits)}, which is not an integer")


def _check_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(entry, str) for entry in value.values()):
        raise _DamagedError(f"{METADATA} is not an object of strings")
    for text in (*value.keys(), *value.values()):
        _check_text(text)
    return value


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _DamagedError(f"{_short(text)} is not Unicode text") from error


def _entry(name: str, value: Any, data_start: int) -> TensorEntry:
    _check_text(name)
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise _DamagedError(f"{_short(name)} has not exactly dtype, shape and data_offsets")
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
        raise _DamagedError(f"{_short(name)} has the unknown dtype {_short(value['dtype'])}")
    dtype = DTYPES[value["dtype"]]
    shape = _sizes(name, "shape", value["shape"])
    offsets = _sizes(name, "data_offsets", value["data_offsets"])
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _DamagedError(f"{_short(name)} has data_offsets {_short(offsets)}")
    if len(shape) > _MOST_DIMENSIONS or _product(max(size, 1) for size in shape) * dtype.itemsize > _MOST_BYTES:
        raise _DamagedError(f"{_short(name)} has the impossible shape {_short(shape)}")
    expected = _product(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != expected:
        found = offsets[1] - offsets[0]
        raise _DamagedError(f"{_short(name)} of shape {_short(shape)} needs {expected} bytes, but has {found}")
    return TensorEntry(name, dtype, shape, data_start + offsets[0], data_start + offsets[1])


def _sizes(name: str, field: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(size) is int for size in value):
        raise _DamagedError(f"{_short(name)} has a {field} that is not a list of integers")
    return tuple(value)


def _check_coverage(entries: Iterable[TensorEntry], data_start: int, size: int) -> None:
    """The tensors cover the rest of the file, each byte once."""
    position = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.stop)):
        if entry.start != position:
            kind = "overlaps another tensor" if entry.start < position else "leaves a gap before it"
            raise _DamagedError(f"{_short(entry.name)} {kind}: it starts at byte {entry.start}, not {position}")
        position = entry.stop
    if position > size:
        raise _DamagedError(f"it is cut off: the tensors end at byte {position}, the file at {size}")
    if position < size:
        raise _DamagedError(f"{size - position} bytes follow the last tensor")


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = text if len(text) <= 100 else text[:97] + "..."
    return text.encode("unicode_escape").decode() if not text.isprintable() else text
