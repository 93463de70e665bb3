"""POST /v1/chat/completions: a conversation answered at once or as server-sent events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from nexus_ray.errors import DataError
from nexus_ray.generation.assistant import Prompt
from nexus_ray.generation.text import Piece
from serve.guard.record import note
from serve.interleave import interleaved
from serve.logprobs import chat_logprobs
from serve.routes.whole import gather, usage_of
from serve.schemas.answers import AnswerMessage, ChatChoice, ChatCompletion, ToolCallMessage
from serve.schemas.chat import ChatRequest
from serve.service import Answer, Service, cancel_all
from serve.sse import EventStream

_FIELDS = {"content": "content", "reasoning": "reasoning_content"}


def add_chat(api: FastAPI, service: Service) -> None:
    """Add the route."""

    @api.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, at once or as server-sent events."""
        service.require(body.model)
        service.check_length(body.asked_tokens[1], body.asked_tokens[0])
        note(request, model=body.model, messages=body.messages)
        prompts = await run_in_threadpool(_prompts, service, body)
        header = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        answers = service.start(prompts)
        if body.stream:
            return EventStream(
                _events(_Chat(service, body, header), answers, request),
                partial(cancel_all, answers),
            )
        choices = [_choice(service, body, *found) for found in await gather(answers, request)]
        usage = usage_of(answers, body.choices)
        note(request, usage=usage, answer=[choice.message.content for choice in choices])
        completion = ChatCompletion(**header, choices=choices, usage=usage)
        return JSONResponse(completion.model_dump(exclude_none=True) | {"choices": list(map(_dump, choices))})


def _prompts(service: Service, body: ChatRequest) -> list[Prompt]:
    """A prompt a choice; the conversation is tokenised once for all of them."""
    try:
        messages, tools = body.conversation(), body.functions()
    except ValueError as error:
        raise DataError(str(error)) from error
    first = service.assistant.chat_prompt(messages, body.model, body.params(0), tools, body.reasoning_effort)
    return [first, *(first.seeded(body.params(choice).seed) for choice in range(1, body.choices))]


def _dump(choice: ChatChoice) -> dict[str, Any]:
    """OpenAI's clients expect `content` and `logprobs` also where they are null."""
    dumped = choice.model_dump(exclude_none=True)
    return {"logprobs": None} | dumped | {"message": {"content": None} | dumped["message"]}


def _choice(service: Service, body: ChatRequest, index: int, pieces: Sequence[Piece], answer: Answer) -> ChatChoice:
    texts = {
        channel: "".join(piece.text for piece in pieces if piece.channel == channel)
        for channel in ("content", "reasoning", "call")
    }
    function = next((piece.function for piece in pieces if piece.channel == "call"), None)
    message = AnswerMessage(
        content=texts["content"] if texts["content"] or function is None else None,
        reasoning_content=texts["reasoning"] or None,
        tool_calls=None
        if function is None
        else [ToolCallMessage(id=_call_id(), function={"name": function, "arguments": texts["call"]})],
    )
    logprobs = None
    if body.logprobs:
        tokens = [choice for piece in pieces if piece.channel == "content" for choice in piece.tokens]
        logprobs = {"content": chat_logprobs(service.assistant.codec, tokens, body.top_logprobs or 0)}
    return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=answer.reading.finish_reason)


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class _Chat:
    """Writes the chunks of one streamed chat.

    Args:
        service: spells tokens.
        body: the request.
        header: id, created and model, the same in each chunk.
    """

    def __init__(self, service: Service, body: ChatRequest, header: dict[str, Any]) -> None:
        self.body = body
        self._codec = service.assistant.codec
        self._header = header | {"object": "chat.completion.chunk"}
        self._called: set[int] = set()

    def chunk(self, index: int, delta: dict[str, Any], **changes: Any) -> dict[str, Any]:
        """One chunk of one choice."""
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | changes
        return self._header | {"choices": [choice]}

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """The chunk of a piece."""
        if piece.channel == "call":
            return self.chunk(index, {"tool_calls": [self._call(index, piece)]})
        logprobs = None
        if self.body.logprobs and piece.channel == "content":
            logprobs = {"content": chat_logprobs(self._codec, piece.tokens, self.body.top_logprobs or 0)}
        return self.chunk(index, {_FIELDS[piece.channel]: piece.text}, logprobs=logprobs)

    def _call(self, index: int, piece: Piece) -> dict[str, Any]:
        """The name and an id come once, arguments as they are written."""
        if index in self._called:
            return {"index": 0, "function": {"arguments": piece.text}}
        self._called.add(index)
        function = {"name": piece.function, "arguments": piece.text}
        return {"index": 0, "id": _call_id(), "type": "function", "function": function}

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk that counts tokens."""
        return self._header | {"choices": [], "usage": usage}


async def _events(chat: _Chat, answers: Sequence[Answer], request: Request) -> AsyncIterator[dict[str, Any]]:
    for index in range(len(answers)):
        yield chat.chunk(index, {"role": "assistant", "content": ""})
    async for index, piece in interleaved(answers):
        if piece is None:
            yield chat.chunk(index, {}, finish_reason=answers[index].reading.finish_reason)
        else:
            note(request, piece=piece.text)
            yield chat.piece(index, piece)
    usage = usage_of(answers, chat.body.choices)
    note(request, usage=usage)
    if chat.body.include_usage:
        yield chat.last(usage.model_dump())
