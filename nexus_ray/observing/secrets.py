"""Taking secrets out of what is told: keys, passwords in addresses, and where trackers are.

An event file is read by more people than the environment of the process that wrote it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

HIDDEN = "***"
SECRET_FIELDS = "train.trackers."  # addresses of trackers may hold passwords
_SHORTEST = 8  # characters of a value worth hiding: a shorter one would hide parts of ordinary words
_NAMED = r"secret|token|password|passwd|credential|signature|api[-_]?key|access[-_]?key(?:[-_]id)?"
_IN_TEXT = rf"{_NAMED}|account[-_]?key|sig"
_VARIABLE = re.compile(rf"(?:(?:^|_)(?:{_NAMED})|password)s?(?:_|$)|(?:^|_)keys?$|connection_?string", re.IGNORECASE)
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(\w[\w+.-]*://)[^/\s@]+@"), rf"\1{HIDDEN}@"),  # user and password of an address
    (re.compile(rf"({re.escape(SECRET_FIELDS)}[\w.]+=)\S+"), rf"\1{HIDDEN}"),  # an override on the command line
    (re.compile(rf"((?<![a-z])(?:{_IN_TEXT})=)[^\s&;,\"']+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(\b(?:password|secret|api[-_]?key)\"?: *\"?)[^\s&;,\"']+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"(\"(?:{_IN_TEXT})\": *\")[^\"]+", re.IGNORECASE), rf"\1{HIDDEN}"),  # of JSON
    (re.compile(r"(\bBearer\s+|\bAuthorization\"?: *\"?\w+\s+)\S+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),  # AWS access key ids
)


def hiding(known: Iterable[str] = (), environment: Mapping[str, str] = os.environ) -> Callable[[Any], Any]:
    """A function that takes secrets out of a JSON value, keys of objects aside.

    Args:
        known: values to be hidden wherever they stand.
        environment: the values of its variables with telling names (..._TOKEN, ..._SECRET_ACCESS_KEY) are hidden too.
    """
    named = [value for name, value in environment.items() if _VARIABLE.search(name)]
    values = sorted({value for value in [*known, *named] if len(value) >= _SHORTEST}, key=len, reverse=True)

    def hide(value: Any) -> Any:
        if isinstance(value, str):
            return _without(value, values)
        if isinstance(value, Mapping):
            return {key: hide(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [hide(item) for item in value]
        return value

    return hide


def _without(text: str, values: Iterable[str]) -> str:
    for value in values:
        text = text.replace(value, HIDDEN)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text
