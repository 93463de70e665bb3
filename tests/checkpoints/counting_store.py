"""An S3 server on loopback that keeps a list of its requests, fails when told to, and can be held up."""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "models"
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass(frozen=True)
class Request:
    """One request: its method, its path and the bytes of content that were answered."""

    method: str
    path: str
    answered: int


class CountingStore:
    """moto's S3 behind a door that counts.

    Attributes:
        requests: what was answered, in order.
        failures: answered with 503 instead, as many requests as this says.
        damage: applied to the content of a GET before it is sent; called with path and content.
        gate: called before each request, with its method and path; may wait.
    """

    def __init__(self) -> None:
        self.requests: deque[Request] = deque()
        self.behave()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)

    def behave(self) -> None:
        """Answer what is asked, at once."""
        self.failures = 0
        self.damage: Callable[[str, bytes], bytes] = lambda path, content: content
        self.gate: Callable[[str, str], None] = lambda method, path: None

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to know."""
        return _CREDENTIALS | {"AWS_ENDPOINT_URL": self.endpoint}

    @property
    def endpoint(self) -> str:
        """URL of the server."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[CountingStore]:
        """Serve until the block ends."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        self.client().create_bucket(Bucket=BUCKET)
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()

    def client(self) -> Any:
        """A plain client, which is no part of what is tested."""
        key, secret = _CREDENTIALS["AWS_ACCESS_KEY_ID"], _CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
        credentials = {"aws_access_key_id": key, "aws_secret_access_key": secret, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.endpoint, **credentials)

    def put(self, directory: Path, prefix: str, **arguments: str) -> str:
        """Upload the files of a directory; returns its URI."""
        client = self.client()
        for file in sorted(path for path in directory.iterdir() if path.is_file()):
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{file.name}", Body=file.read_bytes(), **arguments)
        self.requests.clear()
        return f"s3://{BUCKET}/{prefix}"

    def got(self, ending: str = "") -> int:
        """Bytes that GETs of keys with this ending were answered with."""
        return sum(one.answered for one in self.requests if one.method == "GET" and one.path.endswith(ending))

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.gate(method, path)
        with self._lock:
            fails = self.failures > 0
            self.failures -= fails
        if fails:
            start_response("503 Slow Down", [("Content-Length", str(len(_SLOW_DOWN)))])
            return [b"" if method == "HEAD" else _SLOW_DOWN]
        length = int(environ.get("CONTENT_LENGTH") or 0)
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length)) if length else environ["wsgi.input"]
        with self._lock:  # moto's backend is no more than a dictionary
            content = b"".join(self._moto(environ, start_response))
            self.requests.append(Request(method, path, len(content)))
        return [self.damage(path, content) if method == "GET" else content]


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, *_: object) -> None:
        """Say nothing."""
