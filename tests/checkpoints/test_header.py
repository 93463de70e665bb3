"""The header parser: what the safetensors library refuses is refused, and attacks cost neither time nor memory."""

import json
import random
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import torch
from checkpoints.files import MemoryFile, tensors_of_every_type, with_header
from safetensors.torch import save

from nexus_ray.checkpoints.byte_files import open_file
from nexus_ray.checkpoints.header import DTYPES, dtype_name, read_header
from nexus_ray.errors import ModelError

VALID = save(tensors_of_every_type(), metadata={"format": "pt"})
# What we refuse although the library takes it, and why that is right.
STRICTER = re.compile(
    "twice"  # the library keeps the last of two equal names
    "|exactly dtype, shape and data_offsets|is no size|not an integer"  # it ignores unknown fields and what they hold
    "|unknown dtype"  # types that torch cannot hold, e.g. six-bit floats
    "|impossible shape"  # sizes that torch cannot hold
    "|object of strings"  # it takes null for no metadata
)


def _ours(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | str:
    """{name: (dtype, shape, bytes)}, or why the file is refused."""
    file = MemoryFile(content)
    try:
        entries = read_header(file).entries
    except ModelError as error:
        return error.message
    return {
        name: (dtype_name(entry.dtype), list(entry.shape), file.read(entry.start, entry.stop).numpy().tobytes())
        for name, entry in entries.items()
    }


def _library(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    try:
        found = safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return None
    return {name: (entry["dtype"], list(entry["shape"]), bytes(entry["data"])) for name, entry in found}


def _check_against_library(content: bytes) -> bool:
    """True if accepted; both agree, but for what we refuse on purpose."""
    theirs, ours = _library(content), _ours(content)
    if isinstance(ours, str):
        assert ours.startswith("memory.safetensors is damaged: ")
        assert theirs is None or STRICTER.search(ours), ours
        return False
    assert ours == theirs
    return True


def test_a_valid_file_reads_as_the_library_reads_it() -> None:
    assert _check_against_library(VALID)
    assert read_header(MemoryFile(VALID)).metadata == {"format": "pt"}


def test_every_dtype_of_the_library_that_torch_has() -> None:
    for name, dtype in DTYPES.items():
        values = {"x": {"dtype": name, "shape": [3], "data_offsets": [0, 3 * dtype.itemsize]}}
        assert _check_against_library(with_header(values, bytes(3 * dtype.itemsize)))


def _flip(content: bytearray, draw: random.Random) -> bytes:
    limit = len(content) if draw.random() < 0.1 else 8 + int.from_bytes(content[:8], "little")
    for _ in range(draw.choice((1, 1, 2, 4))):
        content[draw.randrange(limit)] = draw.choice((draw.randrange(256), *b'{}[]",:0123456789-.eE \\'))
    return bytes(content)


def _resize(content: bytearray, draw: random.Random) -> bytes:
    place = draw.randrange(len(content))
    kind = draw.randrange(3)
    if kind == 0:
        return bytes(content[:place])
    if kind == 1:
        return bytes(content) + draw.randbytes(draw.randrange(1, 20))
    return bytes(content[:place] + draw.randbytes(draw.randrange(1, 9)) + content[place:])


_VALUES = (
    *(0, 1, -1, 2, 3, 8, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 1.0, 0.5, 1e300),
    *(True, False, None, "", "F32", "BF16", "F4", "F6_E2M3", "f32", "\x00", [], {}, [[]], [1], [0, 0], [2, 2], "é"),
    float("nan"),
    float("inf"),
)


def _edit(content: bytearray, draw: random.Random) -> bytes:
    """Change one thing of the header and keep its length field right."""
    length = int.from_bytes(content[:8], "little")
    values = json.loads(content[8 : 8 + length])
    name = draw.choice(list(values))
    field = draw.choice(list(values[name]))
    change = draw.randrange(6)
    if change == 0:
        values[name] = draw.choice(_VALUES)
    elif change == 1:
        values[name][field] = draw.choice(_VALUES)
    elif change == 2 and isinstance(values[name][field], list) and values[name][field]:
        values[name][field][draw.randrange(len(values[name][field]))] = draw.choice(_VALUES)
    elif change == 3:
        values[draw.choice(("new", "__metadata__", name + "2"))] = values[name]
    elif change == 4:
        del values[name][field]
    else:
        values[name][draw.choice(("shape", "extra"))] = draw.choice(_VALUES)
    return with_header(values, bytes(content[8 + length :]))


@pytest.mark.parametrize("seed", range(8))
def test_thousands_of_damaged_files(seed: int) -> None:
    draw = random.Random(seed)
    accepted = sum(
        _check_against_library(draw.choice((_flip, _resize, _edit))(bytearray(VALID), draw)) for _ in range(1000)
    )
    assert 0 < accepted < 500  # flips in names and data leave a valid file; most others do not


def _entry(shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _numbers(text: str) -> bytes:
    return b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % text.encode()


_FOUR = b"\0" * 4
ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too few"),
    "seven bytes": (b"\x01" * 7, "too few"),
    "length 2^64-1": (b"\xff" * 8 + b"{}", "its header claims 18446744073709551615 bytes"),
    "length one too long": (b"\x03" + bytes(7) + b"{}", "its header claims 3 bytes, the file has 10"),
    "no header": (bytes(8), "not a JSON object"),
    "list": (with_header([]), "not a JSON object"),
    "null": (with_header(None), "not a JSON object"),
    "leading space": (with_header(b" {}"), "not a JSON object"),
    "byte order mark": (with_header("\ufeff{}".encode()), "not a JSON object"),
    "two values": (with_header(b"{}{}"), "not JSON"),
    "not UTF-8": (with_header(b'{"\xff":1}'), "not JSON"),
    "lone surrogate": (with_header(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "not Unicode"),
    "lone surrogate in metadata": (with_header(b'{"__metadata__":{"a":"\\udfff"}}'), "not Unicode"),
    "control character": (with_header(b'{"a\nb":1}'), "not JSON"),
    "deep": (with_header(b'{"a":' + b"[" * 100_000), "more brackets"),
    "deep and thin": (with_header(b'{"a":' + (b"[" + b" " * 20) * 100_000), "not JSON"),
    "deep objects": (with_header((b'{"aaaaaaaaaaaaaaaaaaaa":') * 100_000), "not JSON"),
    "wide": (with_header(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"), "more brackets"),
    "many numbers": (with_header(_numbers("1," * 1_000_000 + "1"), _FOUR), "impossible shape"),
    "many duplicates": (with_header(b"{" + b'"a":1,' * 200_000 + b'"b":1}'), "names a twice"),
    "one duplicate late": (
        with_header(b"{" + b"".join(b'"%d":1,' % i for i in range(200_000)) + b'"199999":1}'),
        "names 199999 twice",
    ),
    "duplicate field": (
        with_header(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        "names dtype twice",
    ),
    "huge integer": (with_header(_numbers("9" * 100_000), _FOUR), "which is no size"),
    "negative": (with_header(_numbers("-1"), _FOUR), "which is no size"),
    "minus zero": (with_header(_numbers("-0"), _FOUR), "which is no size"),
    "float": (with_header(_numbers("1.0"), _FOUR), "not an integer"),
    "exponent": (with_header(_numbers("1e0"), _FOUR), "not an integer"),
    "huge exponent": (with_header(_numbers("1e999999999"), _FOUR), "not an integer"),
    "NaN": (with_header(_numbers("NaN"), _FOUR), "not an integer"),
    "infinity": (with_header(_numbers("-Infinity"), _FOUR), "not an integer"),
    "true as size": (with_header(_numbers("true"), _FOUR), "a has a shape that is not a list of integers"),
    "text as size": (with_header({"a": _entry(["1"])}, _FOUR), "a has a shape that is not a list of integers"),
    "shape no list": (with_header({"a": _entry(1)}, _FOUR), "a has a shape that is not a list of integers"),
    "no entry": (with_header({"a": 7}), "a has not exactly"),
    "missing field": (with_header({"a": {"dtype": "U8", "shape": [0]}}), "a has not exactly"),
    "unknown field": (with_header({"a": _entry() | {"more": 1}}, _FOUR), "a has not exactly"),
    "unknown dtype": (with_header({"a": _entry(dtype="F33")}, _FOUR), "a has the unknown dtype F33"),
    "dtype no text": (with_header({"a": _entry(dtype=["F32"])}, _FOUR), "a has the unknown dtype"),
    "three offsets": (with_header({"a": _entry(offsets=[0, 4, 4])}, _FOUR), "a has data_offsets"),
    "offsets backwards": (with_header({"a": _entry(offsets=[4, 0])}, _FOUR), "a has data_offsets"),
    "overflow to zero": (with_header({"a": _entry([2**32, 2**32], [0, 0])}), "a has the impossible shape"),
    "overflow times size": (with_header({"a": _entry([2**62], [0, 0])}), "a has the impossible shape"),
    "impossible but empty": (with_header({"a": _entry([0, 2**62, 8], [0, 0])}), "a has the impossible shape"),
    "65 dimensions": (with_header({"a": _entry([1] * 65)}, _FOUR), "a has the impossible shape"),
    "too few bytes": (with_header({"a": _entry([2])}, _FOUR), "a of shape .* needs 8 bytes, but has 4"),
    "too many bytes": (with_header({"a": _entry([1], [0, 8])}, _FOUR * 2), "a of shape .* needs 4 bytes, but has 8"),
    "past the end": (with_header({"a": _entry([2**40], [0, 2**42])}, _FOUR), "cut off: the tensors end at byte"),
    "cut off": (with_header({"a": _entry()}, _FOUR[:3]), "cut off"),
    "bytes left over": (with_header({"a": _entry()}, _FOUR + b"x"), "1 bytes follow the last tensor"),
    "gap": (with_header({"a": _entry(), "b": _entry(offsets=[5, 9])}, bytes(9)), "b leaves a gap"),
    "gap at the start": (with_header({"a": _entry(offsets=[4, 8])}, bytes(8)), "a leaves a gap"),
    "overlap": (with_header({"a": _entry(), "b": _entry(offsets=[2, 6])}, bytes(6)), "b overlaps"),
    "same bytes": (with_header({"a": _entry(), "b": _entry()}, _FOUR), "b overlaps"),
    "metadata list": (with_header({"__metadata__": ["a"]}), "not an object of strings"),
    "metadata number": (with_header({"__metadata__": {"a": 1}}), "not an object of strings"),
    "metadata nested": (with_header({"__metadata__": {"a": {"b": "c"}}}), "not an object of strings"),
}


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """Half a gigabyte more address space than now: a huge allocation fails instead of succeeding."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_named_quickly(name: str, tmp_path: Path) -> None:
    content, message = ATTACKS[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    started = time.monotonic()
    for mapped in (False, True):
        with pytest.raises(ModelError, match=message) as caught:
            read_header(open_file(path, mapped=mapped))
        assert str(path) in caught.value.message
        assert len(caught.value.message) < 1000 + len(str(path))
    assert time.monotonic() - started < 10


def test_a_header_above_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(200_000_000)
    with pytest.raises(ModelError, match="claims 100000001 bytes, more than 100000000"):
        read_header(open_file(path))


def test_a_name_is_shown_without_control_characters() -> None:
    with pytest.raises(ModelError) as caught:
        read_header(MemoryFile(with_header({"\x1b[31mred\n": 7})))
    assert "\\x1b[31mred\\n has not exactly" in caught.value.message
    assert caught.value.message.isprintable()


def test_an_empty_checkpoint_is_valid() -> None:
    assert _check_against_library(with_header(b"{}      "))
    assert torch.float8_e8m0fnu in DTYPES.values()
