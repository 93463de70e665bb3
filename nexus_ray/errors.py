"""Errors a user can cause: each says what was found, what was expected and what to do next.

The command line prints them without a traceback and exits with `exit_code`; anything else that is raised
is a defect of nexus-ray and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class NexusError(Exception):
    """A failure with a message for people and, when there is one, the next step.

    Args:
        message: what was found and what was expected, naming the field or file.
        hint: the next step, as an instruction.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.hint}" if self.hint else self.message


class ConfigError(NexusError):
    """The configuration file, an override or the command line is wrong (exit code 2)."""

    exit_code = 2


class ModelError(NexusError):
    """A model directory is missing, incomplete or not of a supported family."""


class DataError(NexusError):
    """A text source is missing, empty, unreadable or does not fit the model."""


class ArtefactError(NexusError):
    """A file that an earlier stage should have written is missing, damaged or belongs to something else."""


class StorageError(NexusError):
    """The file system refused: disk full, read-only, no permission."""


def error_to_record(error: NexusError) -> dict[str, str | None]:
    """An error as plain data: Ray wraps exceptions that cross processes beyond recognition."""
    return {"error": type(error).__name__, "message": error.message, "hint": error.hint}


def error_from_record(record: Mapping[str, Any]) -> NexusError:
    """The error that `error_to_record` described."""
    kinds: dict[str, type[NexusError]] = {kind.__name__: kind for kind in NexusError.__subclasses__()}
    return kinds.get(str(record["error"]), NexusError)(str(record["message"]), record["hint"])
