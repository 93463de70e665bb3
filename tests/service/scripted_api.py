"""A stand-in for the service's interface: the shapes of its answers, said from a script, without a model."""

import asyncio
import json
import math
import random
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serve.errors import install_handlers
from serve.pages import add_pages


@dataclass
class Token:
    """One token: its bytes need not be whole characters."""

    data: bytes
    logprob: float = -0.5
    others: tuple[tuple[str, float], ...] = ()

    def shape(self) -> dict[str, Any]:
        """OpenAI's shape."""
        own = {"token": self.data.decode(errors="replace"), "logprob": self.logprob, "bytes": list(self.data)}
        others = [{"token": text, "logprob": value, "bytes": list(text.encode())} for text, value in self.others]
        return own | {"top_logprobs": [own, *others]}


@dataclass
class Answer:
    """What a model says: pieces of text with their tokens, after reasoning, and how it ends.

    `ending` is stop, length, error (an error event), drop (the connection breaks) or hang (nothing more comes).
    """

    pieces: list[tuple[str, list[Token]]]
    reasoning: list[str] = field(default_factory=list)
    ending: str = "stop"
    pause: float = 0.0  # seconds between pieces


@dataclass
class Refusal:
    """An answer that is not 2xx."""

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)

    def response(self) -> Response:
        """OpenAI's error object."""
        error = {"message": self.message, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": error}, self.status, self.headers)


class Script:
    """What the stand-in says, and what it was asked."""

    def __init__(self) -> None:
        self.models = ["base", "demo"]
        self.answers: dict[str, Answer] = {}  # by model; others repeat the prompt
        self.refusals: dict[str, list[Refusal]] = {"chat": [], "perplexity": []}  # said first, once each
        self.key: str | None = None  # refuse requests without it
        self.asked: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.given_up: list[str] = []  # models whose client went away

    def bodies(self, model: str) -> list[dict[str, Any]]:
        """What a model was asked, in order."""
        return [body for body in self.asked if body.get("model") == model]


def answer_of(text: str, **how: Any) -> Answer:
    """An answer in word-like tokens with probabilities that a seed makes up."""
    return Answer([(part, [Token(part.encode(), value)]) for part, value in scored(text, text)], **how)


def scored(text: str, seed: str) -> list[tuple[str, float]]:
    """Word-like tokens and log-probabilities with a long tail."""
    chance = random.Random(seed)
    return [(part, -(chance.expovariate(1) ** 2)) for part in re.findall(r"\s?\w+|\s|[^\w\s]", text)]


def scripted_api(script: Script) -> FastAPI:
    """The application: three routes of the interface and the page."""
    api = FastAPI()
    install_handlers(api)

    @api.middleware("http")
    async def require_key(request: Request, go_on: Any) -> Response:
        given = request.headers.get("authorization")
        if request.url.path.startswith("/v1/"):
            script.authorizations.append(given)
            if script.key is not None and given != f"Bearer {script.key}":
                return Refusal(401, "a valid API key is required").response()
        return await go_on(request)

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        cards = [{"id": name, "object": "model", "created": 0, "owned_by": "nexus-ray"} for name in script.models]
        return {"object": "list", "data": cards}

    @api.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> Response:
        script.asked.append(body)
        if script.refusals["chat"]:
            return script.refusals["chat"].pop(0).response()
        return StreamingResponse(_events(script, body), media_type="text/event-stream")

    @api.post("/v1/perplexity")
    async def perplexity(body: dict[str, Any]) -> Response:
        script.asked.append(body)
        if script.refusals["perplexity"]:
            return script.refusals["perplexity"].pop(0).response()
        result = {"index": 0, **perplexity_of(body["text"], body["models"])}
        return JSONResponse({"object": "perplexity", "results": [result]})

    add_pages(api)
    return api


async def _events(script: Script, body: dict[str, Any]) -> AsyncIterator[str]:
    model, prompt = body["model"], body["messages"][-1]["content"]
    answer = script.answers.get(model) or answer_of(f"{model} heard: {prompt}")
    try:
        yield _chunk({"role": "assistant", "content": ""})
        for text in answer.reasoning:
            yield _chunk({"reasoning_content": text})
        for text, tokens in answer.pieces:
            await asyncio.sleep(answer.pause)
            wanted = body.get("logprobs") and tokens
            content = [token.shape() for token in tokens]
            yield _chunk({"content": text}, {"content": content} if wanted else None)
        if answer.ending == "hang":
            await asyncio.sleep(60)
    except asyncio.CancelledError:
        script.given_up.append(model)
        raise
    if answer.ending == "drop":
        raise ConnectionError("the script says so")
    if answer.ending == "error":
        yield _event({"error": {"message": "the engine failed", "type": "server_error", "param": None, "code": None}})
    else:
        yield _chunk({}, finish=answer.ending)
        usage = {"prompt_tokens": 1, "completion_tokens": len(answer.pieces), "total_tokens": 1 + len(answer.pieces)}
        yield _event({"choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _chunk(delta: dict[str, str], logprobs: dict[str, Any] | None = None, finish: str | None = None) -> str:
    return _event({"choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]})


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps({'object': 'chat.completion.chunk', **value})}\n\n"


def perplexity_of(text: str, models: list[str]) -> dict[str, Any]:
    """Tokens of a text, and what each model makes of them."""
    parts = [part for part, _ in scored(text, "")]
    offsets = [sum(map(len, parts[:index])) for index in range(len(parts))]
    scores = {}
    for model in models:
        logprobs = [value for _, value in scored(text, model)]
        scores[model] = _figures(text, logprobs, len(text.split()), len(text.encode()))
    return {"tokens": parts, "offsets": offsets, "scores": scores}


def _figures(text: str, logprobs: list[float], words: int, size: int) -> dict[str, Any]:
    nats = -sum(logprobs)
    return {
        "token_perplexity": math.exp(nats / len(logprobs)),
        "word_perplexity": math.exp(nats / words),
        "byte_perplexity": math.exp(nats / size),
        "bits_per_byte": nats / size / math.log(2),
        "nats_per_token": nats / len(logprobs),
        "tokens": len(logprobs),
        "words": words,
        "bytes": size,
        "token_logprobs": logprobs,
    }
