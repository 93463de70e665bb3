"""Several answers as one stream, in the order in which their pieces come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from nexus_ray.generation.text import Piece
from serve.service import Answer


async def interleaved(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Piece | None]]:
    """(number of the answer, its next piece), None at the end of each.

    Raises:
        Exception: what ended one of them untimely; the others are cancelled then.
    """
    if len(answers) == 1:  # the usual case, without tasks
        async for piece in answers[0]:
            yield 0, piece
        yield 0, None
        return
    pieces: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def forward(index: int, answer: Answer) -> None:
        try:
            async for piece in answer:
                pieces.put_nowait((index, piece))
            pieces.put_nowait((index, None))
        except Exception as error:
            pieces.put_nowait((index, error))

    tasks = [asyncio.create_task(forward(index, answer)) for index, answer in enumerate(answers)]
    try:
        left = len(answers)
        while left:
            index, event = await pieces.get()
            if isinstance(event, Exception):
                raise event
            left -= event is None
            yield index, event
    finally:
        for task, answer in zip(tasks, answers, strict=True):
            task.cancel()
            answer.cancel()
