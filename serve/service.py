"""The engine for asynchronous callers: model names, answers as asynchronous iterators, work dropped when they go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

from nexus_ray.config import Config
from nexus_ray.errors import ConfigError
from nexus_ray.generation.engine import Engine
from nexus_ray.generation.request import Event, Generation, SamplingParams, Which
from nexus_ray.generation.scoring import TextScore
from nexus_ray.generation.text import Piece
from serve.errors import ApiError

BASE = "base"


def student_name(config: Config) -> str:
    """The student's model id: `serve.name`, else the run directory's name.

    Raises:
        ConfigError: it is the base's.
    """
    name = config.serve.name or config.run.directory.resolve().name
    if not name or name == BASE:
        raise ConfigError(f"the student's model id cannot be {name!r}", "choose another with serve.name=NAME")
    return name


class Service:
    """What the routes need: an engine and the names of its two models.

    Args:
        engine: answers and scores.
        student: the student's model id.
    """

    def __init__(self, engine: Engine, student: str) -> None:
        self.engine = engine
        self.models: dict[str, Which] = {BASE: "base", student: "student"}

    def which(self, model: str) -> Which:
        """The model of that id.

        Raises:
            ApiError: there is none (404).
        """
        if model not in self.models:
            known = ", ".join(repr(name) for name in self.models)
            raise ApiError(404, f"there is no model {model[:100]!r}; known: {known}", "model", "model_not_found")
        return self.models[model]

    def check_length(self, asked: int | None, param: str) -> None:
        """Refuse to generate more tokens than the service allows.

        Raises:
            ApiError: more are asked for (400).
        """
        limit = self.engine.max_new_tokens
        if asked is not None and asked > limit:
            raise ApiError(400, f"{param} is {asked}, but this service generates at most {limit} tokens", param)

    async def answer(self, messages: Sequence[dict[str, Any]], which: Which, params: SamplingParams) -> Answer:
        """Queue a chat. Whoever takes the answer must `cancel` it when nobody waits for it any more.

        Raises:
            NexusError: the request does not fit or the queue is full.
        """
        prompt = await run_in_threadpool(self.engine.prepare, messages, which, params)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        generation = self.engine.submit(prompt, lambda event: _post(loop, events, event))
        return Answer(generation, events)

    async def score(self, texts: Sequence[str], which: Sequence[Which]) -> list[dict[Which, TextScore]]:
        """Score texts; a caller that is cancelled stops the work.

        Raises:
            NexusError: a text is empty or the queue is full.
        """
        cancelled = threading.Event()
        try:
            future = await run_in_threadpool(self.engine.score, texts, which, cancelled)
            return await asyncio.wrap_future(future)
        finally:
            cancelled.set()


class Answer:
    """The pieces of one answer as they come."""

    def __init__(self, generation: Generation, events: asyncio.Queue[Event]) -> None:
        self.generation = generation
        self._events = events

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while (event := await self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event


def _post(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    """Hand an event from the engine's thread to the loop's; nobody is left to take it once the loop is closed."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, event)
