"""A chat answer as OpenAI's server-sent events: a role, text, a reason, maybe usage, `[DONE]`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nexus_ray.generation.request import Generation
from serve.errors import as_api_error
from serve.schemas import ErrorAnswer, Usage
from serve.service import Answer

_DONE = "data: [DONE]\n\n"
_FIELDS = {"content": "content", "reasoning": "reasoning_content"}


class AnswerStream(StreamingResponse):
    """Streams an answer; the generation ends with the connection, whoever closes it."""

    def __init__(self, answer: Answer, header: dict[str, Any], include_usage: bool) -> None:
        self._generation = answer.generation
        events = sse_events(answer, header, include_usage)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer (ASGI)."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


def usage(generation: Generation) -> Usage:
    """Token counts of a complete answer."""
    prompt, completion = generation.prompt_tokens, generation.completion_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


async def sse_events(answer: Answer, header: dict[str, Any], include_usage: bool) -> AsyncIterator[str]:
    """The events of one answer.

    Args:
        answer: its pieces.
        header: id, created and model, the same in each chunk.
        include_usage: add a chunk without choices that counts the tokens.
    """
    yield _chunk(header, {"role": "assistant", "content": ""})
    try:
        async for piece in answer:
            yield _chunk(header, {_FIELDS[piece.channel]: piece.text})
    except Exception as error:  # the status line is sent: the failure can only be an event
        yield _event(ErrorAnswer(error=as_api_error(error).detail).model_dump())
        yield _DONE
        return
    yield _chunk(header, {}, answer.generation.finish_reason or "stop")
    if include_usage:
        yield _event(_body(header, []) | {"usage": usage(answer.generation).model_dump()})
    yield _DONE


def _chunk(header: dict[str, Any], delta: dict[str, str], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return _event(_body(header, [choice]))


def _body(header: dict[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {**header, "object": "chat.completion.chunk", "choices": choices}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
