"""The routes of the HTTP interface. They need an engine but no Ray."""

from __future__ import annotations

import time
import uuid
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from nexus_ray import __version__
from serve.errors import as_api_error, install_handlers
from serve.pages import add_pages
from serve.schemas import (
    AnswerMessage,
    ChatCompletion,
    ChatRequest,
    Choice,
    ErrorAnswer,
    ModelCard,
    ModelList,
    PerplexityRequest,
)
from serve.service import Answer, Service
from serve.streaming import AnswerStream, usage

_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorAnswer} for status in (400, 404, 429, 500)}


def build_api(service: Service) -> FastAPI:
    """The FastAPI application over a service."""
    api = FastAPI(title="nexus-ray", version=__version__, responses=_ERRORS)
    install_handlers(api)
    cards = [ModelCard(id=name, created=int(time.time())) for name in service.models]

    @api.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Whether the service is up, and which base it serves."""
        fingerprint = service.engine.loaded.fingerprint
        return {"status": "ok", "models": list(service.models), "base_fingerprint": fingerprint}

    @api.get("/v1/models")
    async def list_models() -> ModelList:
        """The base and the student."""
        return ModelList(data=cards)

    @api.get("/v1/models/{model:path}")
    async def show_model(model: str) -> ModelCard:
        """One of them."""
        service.which(model)
        return next(card for card in cards if card.id == model)

    @api.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, at once or as server-sent events."""
        return await _chat(service, body, request)

    @api.post("/v1/perplexity")
    async def perplexity(body: PerplexityRequest) -> dict[str, Any]:
        """Perplexity of each text under one model, or under base and student side by side."""
        return await _perplexity(service, body)

    add_pages(api)
    return api


async def _chat(service: Service, body: ChatRequest, request: Request) -> Response:
    which = service.which(body.model)
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    service.check_length(body.asked_tokens, param)
    messages = [message.model_dump() for message in body.messages]
    header = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
    answer = await service.answer(messages, which, body.sampling)
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return AnswerStream(answer, header, include_usage)
    try:
        completion = await _complete(answer, header, request)
    except Exception as error:
        raise as_api_error(error) from error
    finally:
        answer.generation.cancel()
    return JSONResponse(completion.model_dump(exclude_none=True))


async def _complete(answer: Answer, header: dict[str, Any], request: Request) -> ChatCompletion:
    """Collect a whole answer, or what there is of it when its client goes away."""
    texts = {"content": "", "reasoning": ""}
    async for piece in answer:
        texts[piece.channel] += piece.text
        if await request.is_disconnected():
            break
    message = AnswerMessage(content=texts["content"], reasoning_content=texts["reasoning"] or None)
    generation = answer.generation
    choice = Choice(message=message, finish_reason=generation.finish_reason or "stop")
    return ChatCompletion(**header, choices=[choice], usage=usage(generation))


async def _perplexity(service: Service, body: PerplexityRequest) -> dict[str, Any]:
    models = service.models if body.model is None else {body.model: service.which(body.model)}
    try:
        scored = await service.score(body.all_texts, list(models.values()))
    except Exception as error:
        raise as_api_error(error) from error
    names = {which: name for name, which in models.items()}
    results = []
    for index, scores in enumerate(scored):
        by_model = {str(which): {"model": names[which], **asdict(score)} for which, score in scores.items()}
        flat = by_model if body.model is None else next(iter(by_model.values()))
        results.append({"index": index} | flat)
    return {"object": "perplexity", "sequence_length": service.engine.sequence_length, "results": results}
