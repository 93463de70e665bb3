"""An S3 protocol server on loopback that can be made to fail as stores do: 503 for a while, listings of the past."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "nexus"
_SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


@dataclass
class Request:
    """One that the server has got."""

    method: str
    path: str
    query: str

    @property
    def is_listing(self) -> bool:
        return self.method == "GET" and "list-type" in parse_qs(self.query, keep_blank_values=True)


@dataclass
class ObjectStore:
    """The server, and what it is told to do wrong.

    Attributes:
        endpoint: where it listens.
        requests: all that came, in order.
        failed: how many of them were refused with 503.
    """

    endpoint: str = ""
    requests: list[Request] = field(default_factory=list)
    failed: int = 0
    _refused: Callable[[Request], bool] = lambda request: False
    _frozen: dict[str, tuple[Any, bytes]] | None = None
    _empty: bool = False
    _lock: Any = field(default_factory=threading.Lock)
    _conditions: Any = field(default_factory=threading.Lock)

    @contextmanager
    def refusing(self, refused: Callable[[Request], bool]) -> Iterator[None]:
        """Answer 503 SlowDown to requests for which `refused` is true."""
        self._refused = refused
        try:
            yield
        finally:
            self._refused = lambda request: False

    @contextmanager
    def refusing_next(self, count: int, method: str | None = None, ending: str = "") -> Iterator[None]:
        """Answer 503 to the next `count` requests of a method to keys with this ending."""
        left = iter(range(count))

        def refused(request: Request) -> bool:
            fits = method in (None, request.method) and request.path.endswith(ending)
            return fits and next(left, None) is not None

        with self.refusing(refused):
            yield

    @contextmanager
    def refusing_every(self, nth: int) -> Iterator[None]:
        """Answer 503 to every n-th request."""
        count = iter(range(1, 1 << 62))
        with self.refusing(lambda request: next(count) % nth == 0):
            yield

    @contextmanager
    def stale_listings(self) -> Iterator[None]:
        """Answer every listing as when it was first asked for in the block."""
        self._frozen = {}
        try:
            yield
        finally:
            self._frozen = None

    @contextmanager
    def empty_listings(self) -> Iterator[None]:
        """Answer every listing as before anything was written: the store's own, of a key that nothing begins with."""
        self._empty = True
        try:
            yield
        finally:
            self._empty = False

    def heal(self) -> None:
        """End all faults and forget all requests."""
        self._refused = lambda request: False
        self._frozen = None
        self._empty = False
        self.requests.clear()
        self.failed = 0

    def client(self) -> Any:
        """boto3's, to look at the store by other means."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )

    def keys(self, prefix: str = "") -> set[str]:
        """All keys of the bucket."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {entry["Key"] for page in pages for entry in page.get("Contents", [])}

    def application(self, inner: Application) -> Application:
        """The WSGI application of the server, with its faults."""

        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            request = Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", ""))
            with self._lock:
                self.requests.append(request)
                if self._refused(request):
                    self.failed += 1
                    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                    start_response("503 Slow Down", [("Content-Type", "application/xml")])
                    return [b"" if request.method == "HEAD" else _SLOW_DOWN]
            if request.is_listing and self._empty:
                environ = environ | {"QUERY_STRING": "list-type=2&prefix=nothing-of-this-name"}
            if request.is_listing and self._frozen is not None:
                return self._listing(request, environ, inner, start_response)
            if "HTTP_IF_MATCH" in environ or "HTTP_IF_NONE_MATCH" in environ:
                with self._conditions:  # a store decides about one at a time
                    return list(inner(environ, start_response))
            return inner(environ, start_response)

        return answer

    def _listing(
        self, request: Request, environ: dict[str, Any], inner: Application, start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        frozen, key = self._frozen, f"{request.path}?{request.query}"
        assert frozen is not None
        if key not in frozen:
            head: list[Any] = []
            body = b"".join(inner(environ, lambda *arguments: head.append(arguments)))
            frozen[key] = (head[0], body)
        arguments, body = frozen[key]
        start_response(*arguments)
        return [body]


@contextmanager
def running_store() -> Iterator[ObjectStore]:
    """A server in a thread of this process, with one empty bucket."""
    store = ObjectStore()
    server = make_server(
        "127.0.0.1", 0, store.application(DomainDispatcherApplication(create_backend_app)), threaded=True
    )
    store.endpoint = f"http://127.0.0.1:{server.port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        store.client().create_bucket(Bucket=BUCKET)
        yield store
    finally:
        server.shutdown()
        thread.join()
