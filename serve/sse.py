"""Server-sent events: how streamed answers travel, and how they end when something goes wrong."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.errors import as_api_error
from serve.schemas.answers import ErrorAnswer

_DONE = "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Sends objects as events; the work behind them ends with the connection, whoever closes it.

    Args:
        events: the objects.
        cancel: stops the work behind them.
    """

    def __init__(self, events: AsyncIterator[dict[str, Any]], cancel: Callable[[], None]) -> None:
        super().__init__(_lines(events), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events (ASGI)."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cancel()


async def _lines(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for event in events:
            yield _line(event)
    except Exception as error:  # the status line is sent: the failure can only be an event
        yield _line(ErrorAnswer(error=as_api_error(error).detail).model_dump())
    yield _DONE


def _line(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
