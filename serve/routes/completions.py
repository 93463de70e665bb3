"""POST /v1/completions: texts continued, and with `echo` and `logprobs` scored, as evaluation harnesses ask for it."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from nexus_ray.generation.assistant import Prompt
from nexus_ray.generation.request import ContextLengthError, ScoringRequest, TokenChoice
from nexus_ray.generation.text import Piece
from serve.guard.record import note
from serve.interleave import interleaved
from serve.logprobs import text_logprobs
from serve.routes.whole import for_a_listener, gather, usage_of
from serve.schemas.answers import TextChoice, TextCompletion, Usage
from serve.schemas.completions import CompletionRequest
from serve.service import Answer, Service, cancel_all
from serve.sse import EventStream


def add_completions(api: FastAPI, service: Service) -> None:
    """Add the route."""

    @api.post("/v1/completions", response_model=TextCompletion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts, at once or as server-sent events."""
        service.require(body.model)
        service.check_length(body.max_tokens, "max_tokens")
        note(request, model=body.model, prompt=body.prompt)
        header = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        prompts = await run_in_threadpool(_prompts, service, body)
        writer = _Writer(service, body, header, prompts)
        await for_a_listener(writer.read_prompts(), request)
        if writer.complete:
            choices, usage = await run_in_threadpool(writer.scored_only)
        else:
            answers = service.start(prompts)
            if body.stream:
                return EventStream(_events(writer, answers, request), partial(cancel_all, answers))
            choices = await run_in_threadpool(writer.written, await gather(answers, request))
            usage = usage_of(answers, body.choices)
        note(request, usage=usage, answer=[choice.text for choice in choices])
        if body.stream:
            return EventStream(writer.at_once(choices, usage), lambda: None)
        completion = TextCompletion(**header, choices=choices, usage=usage)
        return await run_in_threadpool(lambda: JSONResponse(completion.model_dump()))


def _prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    """A prompt a choice, those of one prompt together; each prompt is tokenised once."""
    prompts: list[Prompt] = []
    for prompt in body.prompts:
        if body.new_tokens == 0:  # the prompt alone may fill the context
            prompts += [service.assistant.given_prompt(prompt, body.model)] * body.choices
            continue
        first = service.assistant.text_prompt(prompt, body.model, body.params(0))
        prompts += [first, *(first.seeded(body.params(choice).seed) for choice in range(1, body.choices))]
    return prompts


class _Writer:
    """Writes the choices and chunks of one request.

    Args:
        service: scores prompts and spells tokens.
        body: the request.
        header: id, created and model, the same in each chunk.
        prompts: one a choice.
    """

    def __init__(
        self, service: Service, body: CompletionRequest, header: dict[str, Any], prompts: Sequence[Prompt]
    ) -> None:
        self._service = service
        self._codec = service.assistant.codec
        self._body = body
        self._header = header | {"object": "text_completion"}
        self._prompts = prompts
        self._given: list[list[TokenChoice]] = []
        # One greedy token beside the prompt's log-probabilities, as evaluation harnesses ask for it, takes no more
        # than the pass over the prompt.
        greedy = body.new_tokens == 1 and body.temperature == 0
        self._follow = bool(body.echo) and body.logprobs is not None and greedy and not body.stop
        self.complete = bool(body.echo) and (body.new_tokens == 0 or self._follow)

    async def read_prompts(self) -> None:
        """Score the prompts if they are to be echoed with log-probabilities."""
        if not self._body.echo:
            return
        distinct = self._prompts[:: self._body.choices]
        if self._body.logprobs is None:
            given = [[TokenChoice(id_) for id_ in prompt.request.ids] for prompt in distinct]
        else:
            given = await self._scored(distinct)
        self._given = [choices for choices in given for _ in range(self._body.choices)]

    async def _scored(self, prompts: Sequence[Prompt]) -> list[list[TokenChoice]]:
        longest = self._service.assistant.engine.longest_window
        for prompt in prompts:
            if len(prompt.request.ids) > longest:
                raise ContextLengthError(
                    f"a prompt that is scored has at most {longest} tokens, but this one has {len(prompt.request.ids)}",
                    "shorten the prompt",
                )
        requests = [
            ScoringRequest(ids, ids[1:], prompt.request.model, self._body.logprobs or 0, follow=True)
            if self._follow
            else ScoringRequest(ids[:-1] or ids, ids[1:], prompt.request.model, self._body.logprobs or 0)
            for prompt in prompts
            for ids in [prompt.request.ids]
        ]
        scored = await self._service.score(requests)
        return [[TokenChoice(prompt.request.ids[0]), *choices] for prompt, choices in zip(prompts, scored, strict=True)]

    def scored_only(self) -> tuple[list[TextChoice], Usage]:
        """The choices for which no token has to be generated any more."""
        choices = []
        for index, (prompt, given) in enumerate(zip(self._prompts, self._given, strict=True)):
            ended = self._follow and given[-1].id in prompt.request.end_ids
            text = self._text(given[:-1] if ended else given)
            choices.append(
                TextChoice(
                    index=index,
                    text=text,
                    logprobs=self._logprobs(given, 0),
                    finish_reason="stop" if ended else "length",
                )
            )
        prompt_tokens = sum(len(prompt.request.ids) for prompt in self._prompts) // self._body.choices
        new = len(choices) if self._follow else 0
        return choices, Usage(prompt_tokens=prompt_tokens, completion_tokens=new, total_tokens=prompt_tokens + new)

    def written(self, found: Sequence[tuple[int, Sequence[Piece], Answer]]) -> list[TextChoice]:
        """The choices that the pieces of answers make, given with their numbers."""
        return [self._choice(*one) for one in found]

    def _choice(self, index: int, pieces: Sequence[Piece], answer: Answer) -> TextChoice:
        given = self._given[index] if self._given else []
        before = self._text(given)
        tokens = [token for piece in pieces for token in piece.tokens]
        parts = [self._logprobs(given, 0), self._logprobs(tokens, len(before), generated=True)]
        return TextChoice(
            index=index,
            text=before + "".join(piece.text for piece in pieces),
            logprobs=_joined(*parts),
            finish_reason="stop" if answer.reading.finish_reason == "stop" else "length",
        )

    def chunks_before(self, index: int) -> list[dict[str, Any]]:
        """The echoed prompt, if it is to be."""
        if not self._given:
            return []
        given = self._given[index]
        return [self.chunk(index, self._text(given), self._logprobs(given, 0))]

    def piece(self, index: int, piece: Piece, start: int) -> dict[str, Any]:
        """The chunk of a piece that begins at character `start`."""
        return self.chunk(index, piece.text, self._logprobs(piece.tokens, start, generated=True))

    def length_of(self, piece: Piece) -> int:
        """Characters of its tokens; text that may begin a stop string is held back, its tokens are not."""
        return self._codec.offsets([token.id for token in piece.tokens], generated=True)[-1]

    def chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        """One chunk of one choice."""
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return self._header | {"choices": [choice]}

    async def at_once(self, choices: Sequence[TextChoice], usage: Usage) -> AsyncIterator[dict[str, Any]]:
        """Complete choices as a stream."""
        for choice in choices:
            yield self.chunk(choice.index, choice.text, choice.logprobs, choice.finish_reason)
        if self._body.include_usage:
            yield self.last(usage)

    def last(self, usage: Usage) -> dict[str, Any]:
        """The chunk that counts tokens."""
        return self._header | {"choices": [], "usage": usage.model_dump()}

    @property
    def include_usage(self) -> bool:
        """Whether it is asked for."""
        return self._body.include_usage

    @property
    def choices(self) -> int:
        """Choices a prompt."""
        return self._body.choices

    def _text(self, given: Sequence[TokenChoice]) -> str:
        return self._codec.decode([choice.id for choice in given]) if given else ""

    def _logprobs(
        self, tokens: Sequence[TokenChoice], start: int, *, generated: bool = False
    ) -> dict[str, list[Any]] | None:
        if self._body.logprobs is None:
            return None
        return text_logprobs(self._codec, tokens, self._body.logprobs, start, generated=generated)


def _joined(given: dict[str, list[Any]] | None, generated: dict[str, list[Any]] | None) -> dict[str, list[Any]] | None:
    """Log-probabilities of a prompt and of its continuation."""
    if given is None or generated is None:
        return None
    return {name: [*values, *generated[name]] for name, values in given.items()}


async def _events(writer: _Writer, answers: Sequence[Answer], request: Request) -> AsyncIterator[dict[str, Any]]:
    lengths = [0] * len(answers)
    for index in range(len(answers)):
        for chunk in writer.chunks_before(index):
            lengths[index] += len(chunk["choices"][0]["text"])
            yield chunk
    async for index, piece in interleaved(answers):
        if piece is None:
            reason = "stop" if answers[index].reading.finish_reason == "stop" else "length"
            yield writer.chunk(index, "", reason=reason)
        else:
            note(request, piece=piece.text)
            yield writer.piece(index, piece, lengths[index])
            lengths[index] += writer.length_of(piece)
    usage = usage_of(answers, writer.choices)
    note(request, usage=usage)
    if writer.include_usage:
        yield writer.last(usage)
