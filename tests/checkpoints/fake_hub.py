"""As much of a model hub on loopback as huggingface_hub's file system asks of one: a tree, and ranges of files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from werkzeug.serving import WSGIRequestHandler, make_server

REPOSITORY = "some-one/micro"
_LARGE = ".safetensors"  # kept in git's large file storage, under their SHA-256


class FakeHub:
    """One repository, with the files of a directory.

    Attributes:
        endpoint: URL, for HF_ENDPOINT.
        answered: bytes of each file, by name.
        damage: applied to what is sent of a file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.answered: Counter[str] = Counter()
        self.damage: Callable[[str, bytes], bytes] = lambda name, content: content
        self.endpoint = ""

    def answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        """The WSGI application."""
        path = environ["PATH_INFO"]
        if path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            return _json(start_response, [self._entry(file) for file in sorted(self.directory.iterdir())])
        if path.startswith(f"/api/models/{REPOSITORY}"):
            return _json(start_response, {"id": REPOSITORY, "sha": "0" * 40, "siblings": []})
        file = self.directory / path.rpartition("/")[2]
        if path.startswith(f"/{REPOSITORY}/resolve/main/") and file.is_file():
            part = self._range(file.read_bytes(), environ.get("HTTP_RANGE"), start_response)
            self.answered[file.name] += len(part)
            return [self.damage(file.name, part)]
        start_response("404 Not Found", [("X-Error-Code", "EntryNotFound")])
        return [b""]

    @staticmethod
    def _entry(file: Path) -> dict[str, Any]:
        content = file.read_bytes()
        entry = {"type": "file", "path": file.name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if file.suffix == _LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    @staticmethod
    def _range(content: bytes, asked: str | None, start_response: Callable[..., Any]) -> bytes:
        first, last = (int(end) for end in asked.removeprefix("bytes=").split("-")) if asked else (0, len(content) - 1)
        part = content[first : last + 1]
        headers = [("Content-Length", str(len(part))), ("Content-Range", f"bytes {first}-{last}/{len(content)}")]
        start_response("206 Partial Content" if asked else "200 OK", headers)
        return part

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        """Serve until the block ends."""
        server = make_server("127.0.0.1", 0, self.answer, threaded=True, request_handler=_Quiet)
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()


class _Quiet(WSGIRequestHandler):
    def log_request(self, *_: object) -> None:
        """Say nothing."""


def _json(start_response: Callable[..., Any], value: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(value).encode()]
