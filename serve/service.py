"""The engine for asynchronous callers: answers as asynchronous iterators, work dropped when nobody waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from starlette.concurrency import run_in_threadpool

from nexus_ray.generation.assistant import Assistant, Prompt, Reading
from nexus_ray.generation.request import Continuation, ScoringRequest, TokenChoice, TokenEvent, UnknownModelError
from nexus_ray.generation.text import Piece
from nexus_ray.generation.text_scores import ScoredText, TextScorer
from serve.errors import ApiError


class Answer:
    """One continuation as it comes: its pieces of text, and in the end why it stopped."""

    def __init__(self, prompt: Prompt, reading: Reading, timeout: float) -> None:
        self.prompt_tokens = len(prompt.request.ids)
        self.reading = reading
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout
        self._timeout = timeout
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._continuation: Continuation | None = None

    def take(self, event: TokenEvent) -> None:
        """Take an event on the engine's thread; nobody is left to have it once the loop is closed."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def started(self, continuation: Continuation) -> None:
        """The engine has it."""
        self._continuation = continuation

    def cancel(self) -> None:
        """Stop the work, if there is any left."""
        if self._continuation is not None:
            self._continuation.cancel()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            while (event := await self._next()) is not None:
                if isinstance(event, Exception):
                    raise event
                for piece in self.reading.push(event):
                    yield piece
                if self.reading.finished:
                    break
            for piece in self.reading.flush():
                yield piece
        finally:
            self.cancel()

    async def _next(self) -> TokenEvent:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._events.get()
        except TimeoutError as error:
            raise ApiError(
                504, f"the answer took longer than {self._timeout:g} s", code="timeout", type="server_error"
            ) from error


def cancel_all(answers: Iterable[Answer]) -> None:
    """Stop the work for these answers, as far as there is any left."""
    for answer in answers:
        answer.cancel()


class Service:
    """What the routes need of an engine.

    Args:
        assistant: answers.
        sequence_length: tokens of a window in which texts are scored.
        timeout: seconds that an answer may take.

    Attributes:
        problem: what an operator should know, None if all is well.
    """

    def __init__(self, assistant: Assistant, sequence_length: int, timeout: float = 600) -> None:
        self.problem: str | None = None
        self.assistant = assistant
        self.scorer = TextScorer(assistant, sequence_length)
        self._timeout = timeout

    @property
    def models(self) -> tuple[str, ...]:
        """Model ids, the base first."""
        return self.assistant.engine.models

    def require(self, model: str) -> None:
        """Check that a model is served.

        Raises:
            UnknownModelError: it is not.
        """
        if model not in self.models:
            raise UnknownModelError.of(model, self.models)

    def check_length(self, asked: int | None, param: str) -> None:
        """Refuse to generate more tokens than the service allows.

        Raises:
            ApiError: more are asked for (400).
        """
        limit = self.assistant.max_new_tokens
        if asked is not None and asked > limit:
            raise ApiError(400, f"{param} is {asked}, but this service generates at most {limit} tokens", param)

    def start(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Queue prompts, all or none. Whoever takes the answers must `cancel` those that it does not read to the end.

        Raises:
            BusyError, ClosedError: as `Engine.submit`.
        """
        places = self.assistant.engine.places
        if len(prompts) > places:
            raise ApiError(400, f"{len(prompts)} prompts times choices are asked for, but at most {places} are taken")
        answers: list[Answer] = []
        try:
            for prompt in prompts:
                answer = Answer(prompt, self.assistant.reading(prompt), self._timeout)
                answers.append(answer)
                answer.started(self.assistant.start(prompt, answer.take))
        except BaseException:
            cancel_all(answers)
            raise
        return answers

    async def perplexity(
        self, texts: Sequence[str], models: Sequence[str], sequence_length: int | None, stride: int | None
    ) -> list[ScoredText]:
        """Score texts; a caller that is cancelled stops the work.

        Raises:
            NexusError: as `TextScorer.submit`.
        """
        async with self._scoring() as ended:
            scored = await run_in_threadpool(
                self.scorer.submit, texts, models, ended, sequence_length=sequence_length, stride=stride
            )
            return await asyncio.wrap_future(scored)

    async def score(self, requests: Sequence[ScoringRequest]) -> list[list[TokenChoice]]:
        """Score given tokens; a caller that is cancelled stops the work.

        Raises:
            BusyError, ClosedError: as `Engine.score`.
        """
        async with self._scoring() as ended:
            return await asyncio.wrap_future(self.assistant.engine.score(requests, ended))

    @asynccontextmanager
    async def _scoring(self) -> AsyncIterator[threading.Event]:
        """An event that is set at the end of the block, whatever ends it; the time limit does so with 504."""
        ended = threading.Event()
        try:
            async with asyncio.timeout(self._timeout):
                yield ended
        except TimeoutError as error:
            message = f"scoring took longer than {self._timeout:g} s"
            raise ApiError(504, message, code="timeout", type="server_error") from error
        finally:
            ended.set()
