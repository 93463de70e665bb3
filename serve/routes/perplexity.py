"""POST /v1/perplexity: how well each model predicts given texts, side by side."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from nexus_ray.generation.codec import Codec
from nexus_ray.generation.text_scores import ScoredText, TextScore
from serve.guard.record import note
from serve.routes.whole import for_a_listener
from serve.schemas.perplexity import PerplexityRequest
from serve.service import Service


def add_perplexity(api: FastAPI, service: Service) -> None:
    """Add the route."""

    @api.post("/v1/perplexity", response_model=dict[str, Any])
    async def perplexity(body: PerplexityRequest, request: Request) -> Response:
        """Perplexity of each text under each model, by the conventions of lm-eval's rolling log-likelihood."""
        models = body.all_models or list(service.models)
        for model in models:
            service.require(model)
        note(request, model=models[0] if len(models) == 1 else "several", prompt=body.all_texts)
        work = service.perplexity(body.all_texts, models, body.sequence_length, body.stride)
        scored = await for_a_listener(work, request)
        note(request, usage={"prompt_tokens": sum(len(text.ids) for text in scored)})
        return await run_in_threadpool(_answer, service, body, models, scored)


def _answer(service: Service, body: PerplexityRequest, models: list[str], scored: list[ScoredText]) -> JSONResponse:
    """Written aside: a million tokens take seconds, in which the event loop has others to serve."""
    codec = service.assistant.codec
    results = [
        {"index": index} | _result(codec, result, tokens=body.token_logprobs) for index, result in enumerate(scored)
    ]
    return JSONResponse(
        {
            "object": "perplexity",
            "models": models,
            "sequence_length": body.sequence_length or service.scorer.sequence_length,
            "stride": body.stride,
            "results": results,
        }
    )


def _result(codec: Codec, scored: ScoredText, *, tokens: bool) -> dict[str, Any]:
    scores = {model: _figures(score, tokens=tokens) for model, score in scored.scores.items()}
    if not tokens:
        return {"scores": scores}
    return {
        "tokens": [codec.token_text(id_) for id_ in scored.ids],
        "offsets": codec.offsets(scored.ids)[:-1],
        "scores": scores,
    }


def _figures(score: TextScore, *, tokens: bool) -> dict[str, Any]:
    figures = asdict(score)
    log_probs = figures.pop("token_logprobs")
    return figures | ({"token_logprobs": list(log_probs)} if tokens else {})
