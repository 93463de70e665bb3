"""Answers that are sent when they are complete, and the counting of their tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request

from nexus_ray.generation.text import Piece
from serve.errors import CLIENT_CLOSED, ApiError
from serve.schemas.answers import Usage
from serve.service import Answer, cancel_all

T = TypeVar("T")
_LOOK_SECONDS = 0.25  # between looks at whether the client is still there


async def gather(answers: Sequence[Answer], request: Request) -> list[tuple[int, list[Piece], Answer]]:
    """(number, pieces, answer) of each answer; all of them stop when the client goes away or one fails."""
    try:
        pieces = await for_a_listener(_read_all(answers), request)
        return list(zip(range(len(answers)), pieces, answers, strict=True))
    finally:
        cancel_all(answers)


async def for_a_listener(work: Coroutine[Any, Any, T], request: Request) -> T:
    """What `work` returns; it is cancelled when the client goes away.

    Raises:
        ApiError: it has gone (499, which nobody is left to read but the access log).
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(CLIENT_CLOSED, "the client went away")
        return working.result()
    finally:
        watching.cancel()
        working.cancel()


async def _read_all(answers: Sequence[Answer]) -> list[list[Piece]]:
    return await asyncio.gather(*(_pieces(answer) for answer in answers))


async def _pieces(answer: Answer) -> list[Piece]:
    return [piece async for piece in answer]


async def _disconnect(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(_LOOK_SECONDS)


def usage_of(answers: Sequence[Answer], choices: int) -> Usage:
    """Token counts; a prompt of several choices counts once."""
    prompt = sum(answer.prompt_tokens for answer in answers) // choices
    completion = sum(answer.reading.completion_tokens for answer in answers)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
