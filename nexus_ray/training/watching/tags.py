"""What a record of metrics is called elsewhere: one name a number, in trackers and for `nexus-ray plot --metric`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_GROUPS = {"step": "train"}
_KEYS = ("event", "step")
_UNUSUAL = re.compile(r"[^\w\-.]", re.ASCII)


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Every finite number of a record by its tag.

    A number of a step is `train/NAME`, a nested one `OUTER/INNER`; those of other events begin with the event. Of a
    list by layer there are each layer's and the mean of those that have a value: `router/kl/layer_03`,
    `router/kl/mean`. Characters that trackers refuse become `_`.
    """
    event = record["event"]
    found: dict[str, float] = {}
    for key, value in record.items():
        if key in _KEYS:
            continue
        nested = isinstance(value, Mapping | list)
        prefix = () if event == "step" and nested else (_GROUPS.get(event, event),)
        found |= _numbers((*prefix, key), value)
    return found


def texts_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Every text of a record by its tag."""
    event = record["event"]
    return {_tag((event, key)): value for key, value in record.items() if isinstance(value, str) and key not in _KEYS}


def _numbers(path: tuple[str, ...], value: Any) -> dict[str, float]:
    if isinstance(value, Mapping):
        return {tag: number for key, inner in value.items() for tag, number in _numbers((*path, key), inner).items()}
    if isinstance(value, list):
        return _layers(path, value)
    return {_tag(path): float(value)} if _is_number(value) else {}


def _layers(path: tuple[str, ...], values: Sequence[Any]) -> dict[str, float]:
    known = {f"layer_{layer:02d}": float(value) for layer, value in enumerate(values) if _is_number(value)}
    if known:
        known["mean"] = sum(known.values()) / len(known)
    return {_tag((*path, name)): value for name, value in known.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _tag(path: Sequence[str]) -> str:
    return "/".join(_UNUSUAL.sub("_", str(part)) for part in path)
