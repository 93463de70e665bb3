"""Requests to an object store: what passes by itself is tried again, what does not becomes an error for people.

A store under load answers 503 for a while, connections break, gateways time out: each request is repeated, with
random exponential waits, until a deadline. A missing object, a wrong credential or a forbidden bucket is not.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential
from upath import UPath

from nexus_ray.errors import StorageError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

DEADLINE_VARIABLE = "NEXUS_RAY_STORAGE_DEADLINE"
DEADLINE = 300.0  # seconds that a request is repeated
LONGEST_WAIT = 10.0  # seconds between two attempts
_most: ContextVar[float] = ContextVar("most seconds that a request is repeated", default=math.inf)
_CONTINUES = "run the same command again when it answers: it continues"

_FIRST_FAILURE = 400  # of HTTP statuses
_PASSING_STATUS = {408, 409, 429, 500, 502, 503, 504}
_PASSING_CODES = {"SlowDown", "RequestTimeTooSkewed", "RequestTimeout", "InternalError", "ServiceUnavailable"}
_PASSING_ERRNO = {
    errno.EBUSY,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.EPIPE,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
}
# Of botocore, aiohttp, httpx, urllib3 and azure-core, by name: none of them is imported for a store that is not used.
_PASSING_TYPES = {
    "HTTPClientError",
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ResponseParserError",
    "IncompleteRead",
    "FSTimeoutError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ServiceRequestError",
    "ServiceResponseError",
    "ResponseStreamingError",
    "FlexibleChecksumError",
    "TransportError",
}
_CREDENTIAL_TYPES = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}
_PERMANENT = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, NotImplementedError)


def retrying(action: Callable[[], Result], place: UPath, doing: str) -> Result:
    """The result of `action`, which is called again while the store fails in a way that passes.

    Args:
        action: makes requests; must have the same effect when it is done twice.
        place: what it is about, for messages.
        doing: what it does with it, in words: "write", "read".

    Raises:
        FileNotFoundError: the store says that there is no such object.
        FileExistsError: the store says that there is one, where none was expected.
        StorageError: it refused, or failed until the deadline; names the place.
    """
    seconds = deadline()
    attempts = Retrying(
        retry=retry_if_exception(passes),
        stop=stop_after_delay(seconds),
        wait=wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT),
        before_sleep=_Warning(place, seconds),
        reraise=True,
    )
    begin = time.monotonic()
    try:
        return attempts(action)
    except _PERMANENT:
        raise
    except (StorageError, KeyboardInterrupt):
        raise
    except Exception as error:  # each kind of storage raises types of its own
        raise _for_people(error, place, doing, time.monotonic() - begin) from error


def deadline() -> float:
    """Seconds that a request is repeated before the command gives up."""
    return min(_most.get(), float(os.environ.get(DEADLINE_VARIABLE) or DEADLINE))


@contextmanager
def for_at_most(seconds: float) -> Iterator[None]:
    """Repeat requests of the block no longer than this: what may as well be left undone."""
    token = _most.set(seconds)
    try:
        yield
    finally:
        _most.reset(token)


def passes(error: BaseException) -> bool:
    """Whether a failure is of a kind that passes: the store is overloaded or out of reach."""
    chain = list(_chain(error))
    if any(_code(one) in _PASSING_CODES for one in chain):
        return True
    if isinstance(error, (*_PERMANENT, PermissionError)) or not isinstance(error, Exception):
        return False
    status = status_of(error)
    if status is not None:
        return status in _PASSING_STATUS
    return any(_is_passing(one) for one in chain)


def answer(error: BaseException) -> str:
    """What the store answered, short: "503 SlowDown", or the failure to reach it."""
    status, code = status_of(error), code_of(error)
    if status is not None:
        return " ".join(dict.fromkeys([str(status), *([code] if code else [])]))
    return f"{type(error).__name__}: {error}"


class _Warning:
    """Says once that a request waits."""

    def __init__(self, place: UPath, seconds: float) -> None:
        self.place, self.seconds, self.said = place, seconds, False

    def __call__(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if error is not None and not self.said:
            logger.warning("%s: object store answers %s, waiting up to %.0f s", self.place, answer(error), self.seconds)
            self.said = True


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def code_of(error: BaseException) -> str | None:
    """The store's word for a failure ("SlowDown", "NoSuchUpload"), where the exception of a library tells."""
    return next((code for code in map(_code, _chain(error)) if code), None)


def _code(error: BaseException) -> str | None:
    response: Any = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return str(code) if code else None


def status_of(error: BaseException) -> int | None:
    """The HTTP status that a failure is about, where the exception of a library tells."""
    for one in _chain(error):
        response: Any = getattr(one, "response", None)
        if isinstance(response, dict):
            candidates = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
        else:
            candidates = [getattr(one, name, None) for name in ("status", "status_code", "code")]
            candidates.append(getattr(response, "status_code", None))
        found = next((int(value) for value in candidates if str(value).isdigit()), 0)
        if found >= _FIRST_FAILURE:
            return found
    return None


def _is_passing(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, (TimeoutError, ConnectionError)) or names & _PASSING_TYPES:
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNO


def _for_people(error: Exception, place: UPath, doing: str, seconds: float) -> StorageError:
    names = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    if passes(error):
        return StorageError(
            f"cannot {doing} {place}: the object store answered {answer(error)} for {seconds:.0f} s", _CONTINUES
        )
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return StorageError(
            f"cannot {doing} {place}: the disk of this node is full ({error})",
            "free some space, or name another disk with the environment variable NEXUS_RAY_CACHE",
        )
    if names & _CREDENTIAL_TYPES:
        return StorageError(
            f"cannot {doing} {place}: no credentials for the object store ({error})",
            "give this node a role, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; see docs/storage.md",
        )
    if isinstance(error, PermissionError):
        return StorageError(
            f"cannot {doing} {place}: the object store refused ({error})",
            "check the credentials of this node and the policy of the bucket; see docs/storage.md",
        )
    return StorageError(
        f"cannot {doing} {place}: {error}", "check the URI, the endpoint and the network, and try again"
    )
