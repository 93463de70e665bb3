"""Failures as OpenAI's error object, whatever raised them: the interface, validation, the engine or a defect."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nexus_ray.errors import ConfigError, DataError, ModelError, NexusError
from nexus_ray.generation.request import BusyError, ClosedError, ContextLengthError, UnknownModelError
from serve.schemas.answers import ErrorAnswer, ErrorDetail

logger = logging.getLogger(__name__)
CLIENT_CLOSED = 499  # nginx's number for a client that went away
_INVALID = "invalid_request_error"


class ApiError(Exception):
    """A request that cannot be answered.

    Args:
        status: HTTP status.
        message: what was found and what was expected.
        param: the field of the request.
        code: a name for programs.
        type: kind of the error.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, type: str = _INVALID
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message=message, type=type, param=param, code=code)


def as_api_error(error: Exception) -> ApiError:
    """The answer to an exception; a defect is logged and does not show its insides."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return ApiError(400, _text(error), code="context_length_exceeded")
        case UnknownModelError():
            return ApiError(404, _text(error), "model", "model_not_found")
        case DataError() | ConfigError() | ModelError():  # of a request: a model without a chat template
            return ApiError(400, _text(error))
        case BusyError():
            return ApiError(429, _text(error), code="rate_limit_exceeded", type="rate_limit_error")
        case ClosedError():
            return ApiError(503, _text(error), code="unavailable", type="server_error")
        case NexusError():
            logger.error("%s", error)
            return ApiError(500, _text(error), code="internal_error", type="server_error")
    logger.error("a request failed", exc_info=error)
    return ApiError(
        500, "the server failed on this request; its log says why", code="internal_error", type="server_error"
    )


def install_handlers(app: FastAPI) -> None:
    """Make `app` answer every failure with OpenAI's error object."""
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ApiError, _on_error)
    app.add_exception_handler(NexusError, _on_error)
    app.add_exception_handler(Exception, _on_error)


def _text(error: NexusError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message


def error_response(error: ApiError) -> JSONResponse:
    """The answer that says so."""
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    if error.status == 401:
        headers = {"WWW-Authenticate": "Bearer"}
    return JSONResponse(ErrorAnswer(error=error.detail).model_dump(), error.status, headers)


async def _on_error(_: Request, error: Exception) -> JSONResponse:
    return error_response(as_api_error(error))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}.get(error.status_code)
    answer = error_response(
        ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path[:200]}", code=code)
    )
    answer.headers.update(error.headers or {})  # Allow, of a 405
    return answer


async def _on_validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    message = "; ".join(_explain(problem) for problem in problems)
    return error_response(ApiError(400, message, _location(problems[0]) or None))


def _location(problem: dict[str, Any]) -> str:
    """Dotted path of the field, e.g. messages.0.role."""
    parts = [str(part) for part in problem["loc"] if part != "body"]
    return "" if problem["type"] == "json_invalid" else ".".join(parts)


def _explain(problem: dict[str, Any]) -> str:
    location = _location(problem)
    match problem["type"]:
        case "json_invalid":
            return f"the body is not JSON: {problem.get('ctx', {}).get('error', problem['msg'])}"
        case "extra_forbidden":
            return f"unrecognised request argument: {location}"
        case "missing":
            return f"{location or 'the JSON body'} is required"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{location}: {message}" if location else message
