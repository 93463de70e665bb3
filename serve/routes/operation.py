"""Routes about the service itself: which models there are, whether it works, what it has done."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from nexus_ray.errors import NexusError
from serve.errors import ApiError
from serve.guard.metrics import Metrics
from serve.schemas.answers import ModelCard, ModelList
from serve.service import Service


def add_operation(api: FastAPI, service: Service, metrics: Metrics) -> None:
    """Add the routes."""
    created = int(time.time())

    def cards() -> list[ModelCard]:
        base, *students = service.models
        return [ModelCard(id=base, created=created)] + [
            ModelCard(id=name, created=created, parent=base) for name in students
        ]

    @api.get("/healthz")
    async def healthz() -> dict[str, Any]:
        """Whether the engine is able to work, and what it serves."""
        try:
            service.assistant.engine.check()
        except NexusError as error:
            raise ApiError(503, error.message, code="unavailable", type="server_error") from error
        state = service.assistant.engine.state()
        problem = {} if service.problem is None else {"problem": service.problem}
        held = {"running": state.running, "scoring": state.scoring}
        return {"status": "ok", "models": list(service.models)} | held | problem

    @api.get("/v1/models")
    async def list_models() -> ModelList:
        """The base and its students."""
        return ModelList(data=cards())

    @api.get("/v1/models/{model:path}")
    async def show_model(model: str) -> ModelCard:
        """One of them."""
        service.require(model)
        return next(card for card in cards() if card.id == model)

    @api.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        """What this replica has done, for Prometheus."""
        return Response(metrics.exposition(), media_type=metrics.media_type)
