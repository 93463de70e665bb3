"""The HTTP application over a service: routes, and what stands around them. It needs no Ray."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from nexus_ray import __version__
from serve.errors import install_handlers
from serve.guard.access_log import AccessLog
from serve.guard.body_limit import BodyLimit
from serve.guard.keys import KeyFile, RequireKey
from serve.guard.metrics import Metrics
from serve.pages import add_pages
from serve.routes.chat import add_chat
from serve.routes.completions import add_completions
from serve.routes.operation import add_operation
from serve.routes.perplexity import add_perplexity
from serve.schemas.answers import ErrorAnswer
from serve.service import Service

_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 404, 413, 429, 500, 503, 504)
}
_MAX_BODY_BYTES = 4 << 20


def build_api(
    service: Service, *, keys: KeyFile | None = None, max_body_bytes: int = _MAX_BODY_BYTES, log_text: bool = False
) -> FastAPI:
    """The FastAPI application over a service.

    Args:
        service: answers.
        keys: who may ask; None: anybody.
        max_body_bytes: larger requests are refused.
        log_text: write prompts and answers into the access log.
    """
    api = FastAPI(title="nexus-ray", version=__version__, responses=_FAILURES)
    metrics = Metrics(service.assistant.engine)
    install_handlers(api)
    add_operation(api, service, metrics)
    add_chat(api, service)
    add_completions(api, service)
    add_perplexity(api, service)
    add_pages(api)
    # The last one added is outermost: refusals are logged as well.
    api.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    if keys is not None:
        api.add_middleware(RequireKey, keys=keys)
    api.add_middleware(AccessLog, metrics=metrics, keeps_text=log_text)
    return api
