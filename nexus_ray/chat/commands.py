"""The commands of the terminal chat: what a line that begins with a slash asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nexus_ray.errors import ConfigError

_HOTTEST = 2.0  # as in the service's requests
_SHORT = ("base", "student", "both")  # for /model and their name
_PLAIN = ("reset", "help", "quit")
_LIST = "/help lists the commands"


@dataclass(frozen=True)
class Command:
    """A command that was understood.

    Attributes:
        name: model, temp, max, save, reset, help or quit.
        value: a model's name, a temperature, a number of tokens or a file; None for the last three.
    """

    name: str
    value: str | float | None = None


def parse(line: str, models: Sequence[str]) -> Command:
    """Read a command.

    Args:
        line: begins with a slash; no whitespace around it.
        models: names that /model takes; base, student and both are commands of their own too.

    Raises:
        ConfigError: there is no such command, or its value is missing, too much, or out of its range.
    """
    word, _, rest = line.removeprefix("/").partition(" ")
    value = rest.strip()
    if word in (*_SHORT, *_PLAIN):
        if value:
            raise ConfigError(f"/{word} takes nothing after it, found {value!r}", _LIST)
        return Command("model", word) if word in _SHORT else Command(word)
    if word == "model":
        return Command(word, _model(value, models))
    if word == "temp":
        return Command(word, _temperature(value))
    if word == "max":
        return Command(word, _tokens(value))
    if word == "save":
        if not value:
            raise ConfigError("/save needs a file", "for example /save talk.jsonl")
        return Command(word, value)
    raise ConfigError(f"unknown command /{word}", _LIST)


def _model(value: str, models: Sequence[str]) -> str:
    if value not in models:
        found = f"nobody is called {value!r}" if value else "/model needs a name"
        raise ConfigError(found, f"choose one of {', '.join(models)}")
    return value


def _temperature(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= _HOTTEST:
        raise ConfigError(f"/temp needs a number from 0 to {_HOTTEST:g}, found {value!r}", "for example /temp 0.7")
    return number


def _tokens(value: str) -> int:
    number = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0
    if number < 1:
        raise ConfigError(f"/max needs a whole number of tokens from 1 up, found {value!r}", "for example /max 200")
    return number
