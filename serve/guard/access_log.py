"""One line of JSON a request: who asked which model for what, how long it took; no text unless it is asked for."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import CLIENT_CLOSED
from serve.guard.metrics import Metrics
from serve.guard.record import Record, open_record, path_of

logger = logging.getLogger("nexus_ray.serve.access")
_REQUEST_ID = re.compile(rb"[\w.-]{1,64}")


class AccessLog:
    """Writes the log, counts requests, and gives each an id that it is told in `x-request-id`.

    Args:
        app: what answers.
        metrics: counts.
        keeps_text: write prompts and answers too.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, keeps_text: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._keeps_text = keeps_text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = open_record(scope, _request_id(scope), keeps_text=self._keeps_text)
        status, complete = CLIENT_CLOSED, False

        async def watched(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", record.request_id.encode())]
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        with self._metrics.in_flight():
            try:
                await self._app(scope, receive, watched)
            finally:
                self._write(scope, record, status if complete else CLIENT_CLOSED)

    def _write(self, scope: Scope, record: Record, status: int) -> None:
        seconds = time.monotonic() - record.began
        self._metrics.count(_route(scope), status, seconds, record)
        if path_of(scope) in ("/healthz", "/metrics"):  # asked for every few seconds by machines
            return
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": record.request_id,
            "client": record.client,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(seconds, 4),
            "model": record.model,
            **record.usage,
        }
        if record.first_piece is not None:
            line["first_piece_seconds"] = round(record.first_piece, 4)
        if record.keeps_text:
            line |= {"given": record.given, "answer": "".join(text for text in record.answer if text)}
        logger.info(json.dumps(line, default=_plain))


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else str(value)


def _request_id(scope: Scope) -> str:
    """The client's own id if it is one that can stand in a log, else a new one."""
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _route(scope: Scope) -> str:
    """The path as the route has it: paths that clients invent must not become names of metrics."""
    route = scope.get("route")
    return str(getattr(route, "path", "other"))
