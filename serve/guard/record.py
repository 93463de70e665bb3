"""What is known of one request while it is answered, for the access log and the metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.types import Scope

from serve.schemas.answers import Usage

_KEY = "nexus_ray.record"


@dataclass
class Record:
    """Of one request.

    Attributes:
        request_id: the client's, or a new one.
        began: `time.monotonic()` when it came.
        client: name of its API key.
        model: asked for.
        usage: token counts, once they are known.
        first_piece: seconds to the first piece of a streamed answer.
        given: prompt or messages; only for the access log that writes text.
        answer: pieces of the answer; the same.
    """

    request_id: str
    began: float = field(default_factory=time.monotonic)
    client: str | None = None
    model: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    first_piece: float | None = None
    given: Any = None
    answer: list[str] = field(default_factory=list)
    keeps_text: bool = False


def open_record(scope: Scope, request_id: str, *, keeps_text: bool) -> Record:
    """Begin the record of a request."""
    record = Record(request_id, keeps_text=keeps_text)
    scope[_KEY] = record
    return record


def record_of(scope: Scope) -> Record | None:
    """The record of a request, None where nobody keeps one."""
    found: Record | None = scope.get(_KEY)
    return found


def path_of(scope: Scope) -> str:
    """The path within the application, which may be mounted below others."""
    root, path = scope.get("root_path", ""), str(scope["path"])
    return path[len(root) :] or "/" if root and path.startswith(root) else path


def note(
    request: Request,
    *,
    model: str | None = None,
    usage: Usage | dict[str, int] | None = None,
    piece: str | None = None,
    answer: Any = None,
    **given: Any,
) -> None:
    """Note what a route has learnt of its request; text is kept only where the access log wants it."""
    record = record_of(request.scope)
    if record is None:
        return
    record.model = model or record.model
    if usage is not None:
        record.usage = usage if isinstance(usage, dict) else usage.model_dump()
    if piece is not None and record.first_piece is None:
        record.first_piece = time.monotonic() - record.began
    if record.keeps_text:
        record.given = given or record.given
        record.answer += [piece] if piece is not None else answer or []
