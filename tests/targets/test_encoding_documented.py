"""docs/targets-format.md, taken at its word: its examples are what the code writes, and its rules read them.

The readers below use nothing of nexus-ray: they are what somebody would write who has only that page.
"""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from nexus_ray.targets.encoding.bits import low_bits, pack_sorted
from nexus_ray.targets.encoding.encodings import HiddenEncoding, OutputEncoding
from nexus_ray.targets.encoding.routers import RouterEncoding
from nexus_ray.targets.encoding.top_k import TopKEncoding

PAGE = Path(__file__).parents[2] / "docs" / "targets-format.md"
EXAMPLES = [
    json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
]
BY_MODE = {f"{example['encoding']['mode']}-{index}": example for index, example in enumerate(EXAMPLES[1:])}


def bit(content: bytes, place: int) -> int:
    return content[place // 8] >> (place % 8) & 1


def read_packed(content: bytes, count: int, bits: int) -> list[int]:
    return [sum(bit(content, i * bits + place) << place for place in range(bits)) for i in range(count)]


def sorted_sizes(count: int, universe: int) -> list[tuple[int, int]]:
    """(bytes, low bits) for every number of low bits."""
    upper = [math.ceil((count + (universe - 1) // 2**low) / 8) for low in range(universe.bit_length() + 1)]
    return [(math.ceil(count * low / 8) + size, low) for low, size in enumerate(upper)]


def read_sorted(content: bytes, count: int, universe: int) -> list[int]:
    size, low = min(sorted_sizes(count, universe))
    assert len(content) == size
    lower = read_packed(content, count, low)
    vector = content[math.ceil(count * low / 8) :]
    ones = [place for place in range(8 * len(vector)) if bit(vector, place)]
    return [(place - i << low) + lower[i] for i, place in enumerate(ones)]


def read_top_k(ids: bytes, values: bytes, scale: bytes, k: int, universe: int, bits: int) -> dict[str, Any]:
    gap, span, tail = struct.unpack("<BBe", scale)
    gap, span = 32 * (gap / 255) ** 2, 32 * (span / 255) ** 2
    codes = read_packed(values, k, bits)
    assert codes.count(0) == 1
    drops = [gap + (code - 1) * span / (2**bits - 2) if code else 0.0 for code in codes]
    total = math.log(sum(math.exp(-drop) for drop in drops))
    kept = math.log(1 - math.exp(tail))
    return {
        "ids": read_sorted(ids, k, universe),
        "values": codes,
        "log_probs": [kept - drop - total for drop in drops],
        "tail_log_prob": tail,
    }


def read_bfloat16(low: bytes, high: bytes) -> list[float]:
    return [struct.unpack("<f", bytes([0, 0, *both]))[0] for both in zip(low, high, strict=True)]


def read_float8(code: int) -> float:
    sign, exponent, mantissa = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
    return sign * (mantissa / 8 * 2.0**-6 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def read(encoding: dict[str, Any], columns: dict[str, bytes]) -> dict[str, Any]:
    if encoding["mode"] == "topk":
        names = ("top_ids", "top_values", "top_scale")
        size = (encoding["k"], encoding["vocabulary"], encoding["value_bits"])
        return read_top_k(*(columns[name] for name in names), *size)
    if encoding["mode"] == "sampled":
        ids = read_sorted(columns["draws"], encoding["draws"], encoding["vocabulary"])
        return {"ids": ids, "entropy": struct.unpack("<f", columns["entropy"])[0]}
    if encoding.get("dtype") == "bfloat16":
        return {"hidden": read_bfloat16(columns["hidden_low"], columns["hidden_high"])}
    if encoding.get("dtype") == "float8":
        (scale,) = struct.unpack("<f", columns["hidden_scale"])
        return {"hidden": [read_float8(code) * scale for code in columns["hidden"]]}
    return read_routers(encoding, columns)


def read_levels(codes: bytes, scale: bytes) -> list[float]:
    (step,) = struct.unpack("<e", scale)
    return [-code * step for code in codes]


def read_routers(encoding: dict[str, Any], columns: dict[str, bytes]) -> dict[str, Any]:
    layers, experts, chosen = len(encoding["layers"]), encoding["experts"], encoding["experts_per_token"]
    pieces = [
        {name: value[i * len(value) // layers : (i + 1) * len(value) // layers] for name, value in columns.items()}
        for i in range(layers)
    ]
    if encoding["mode"] == "logits":
        return {"logits": [read_levels(piece["router_logits"], piece["router_scale"]) for piece in pieces]}
    names = ("router_ids", "router_values", "router_scale")
    found = [read_top_k(*(piece[name] for name in names), chosen, experts, 8) for piece in pieces]
    return {name: [one[name] for one in found] for name in ("ids", "log_probs", "tail_log_prob")}


def write(example: dict[str, Any]) -> dict[str, torch.Tensor]:
    if "router" in example:
        return RouterEncoding.model_validate(example["encoding"]).encode(torch.tensor([example["router"]]))
    encoding = TypeAdapter(OutputEncoding).validate_python(example["encoding"])
    if isinstance(encoding, HiddenEncoding):
        return encoding.encode(torch.tensor([[1.0, -2.5, 0.15625]]))
    logits = torch.zeros(1, encoding.vocabulary)
    for token, value in example["logits"].items():
        logits[0, int(token)] = value
    if isinstance(encoding, TopKEncoding):
        return encoding.encode(logits)
    return encoding.encode(logits, torch.tensor([example["offset"]], dtype=torch.float64))


def near(found: Any, expected: Any) -> bool:
    flat = torch.tensor(found, dtype=torch.float64)
    return torch.allclose(flat, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)


def test_the_page_has_an_example_of_every_mode():
    modes = [(example["encoding"]["mode"], example["encoding"].get("dtype")) for example in BY_MODE.values()]
    hidden = [("hidden", "bfloat16"), ("hidden", "float8")]
    assert modes == [("topk", None), ("sampled", None), *hidden, ("logits", None), ("selected", None)]


@pytest.mark.parametrize("name", BY_MODE)
def test_its_examples_are_what_is_written(name):
    columns = {column: bytes(values[0].numpy()).hex() for column, values in write(BY_MODE[name]).items()}
    assert columns == BY_MODE[name]["columns"]


@pytest.mark.parametrize("name", BY_MODE)
def test_its_rules_read_its_examples(name):
    example = BY_MODE[name]
    found = read(example["encoding"], {column: bytes.fromhex(value) for column, value in example["columns"].items()})
    assert found.keys() <= example.keys()
    for field, expected in found.items():
        assert near(expected, example[field]), field


def test_its_example_of_sorted_integers_is_what_is_written_and_read():
    example = EXAMPLES[0]
    count, universe = len(example["sorted"]), example["universe"]
    assert min(sorted_sizes(count, universe))[1] == low_bits(count, universe) == example["low_bits"]
    assert bytes(pack_sorted(torch.tensor(example["sorted"]), universe).numpy()).hex() == example["bytes"]
    assert read_sorted(bytes.fromhex(example["bytes"]), count, universe) == example["sorted"]


@pytest.mark.parametrize("seed", range(6))
def test_its_rules_read_what_is_written_of_random_logits(seed):
    generator = torch.Generator().manual_seed(seed)
    k, bits, vocabulary = [(1, 2, 5), (5, 3, 100), (64, 4, 4117), (12, 7, 300), (50, 16, 50), (9, 11, 1000)][seed]
    encoding = TopKEncoding(k=k, vocabulary=vocabulary, value_bits=bits)
    columns = encoding.encode(torch.randn(8, vocabulary, generator=generator) * 3)
    decoded = encoding.decode(columns)
    for row in range(8):
        of_row = {name: bytes(values[row].numpy()) for name, values in columns.items()}
        found = read({"mode": "topk", "k": k, "vocabulary": vocabulary, "value_bits": bits}, of_row)
        assert found["ids"] == decoded.ids[row].tolist()
        assert near(found["log_probs"], decoded.log_probs[row].tolist())
        assert near(found["tail_log_prob"], decoded.tail_log_prob[row].item())
