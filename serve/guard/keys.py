"""API keys: only their hashes are kept, and a wrong key takes as long to refuse as a nearly right one.

Keys are long and random (`nexus-ray api-key` makes them), so one SHA-256 is enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from nexus_ray.errors import ConfigError
from serve.errors import ApiError, error_response
from serve.guard.record import path_of, record_of

VARIABLE = "NEXUS_RAY_API_KEYS"
_LINE = re.compile(r"(?P<name>[\w.@-]{1,64}):(?P<digest>[0-9a-f]{64})")
# Everything else needs a key: the page itself, its files, what machines ask for, and the interface's description.
_PUBLIC = frozenset(("/", "/healthz", "/metrics", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"))
_PUBLIC_FOLDER = "/web/"


def new_key(name: str) -> tuple[str, str]:
    """(a new key, the line for the file that goes with it).

    Raises:
        ConfigError: the name cannot stand in such a line.
    """
    key = f"nr-{secrets.token_urlsafe(32)}"
    line = f"{name}:{_digest(key)}"
    if not _LINE.fullmatch(line):
        raise ConfigError(f"a key cannot be called {name!r}", "use up to 64 letters, digits and . _ - @")
    return key, line


def parse_keys(lines: Iterable[str], source: str) -> dict[str, str]:
    """{digest: name} of lines `NAME:SHA256-OF-KEY`; empty ones and comments are left out.

    Raises:
        ConfigError: a line is something else. What it holds is not shown: it may be a key.
    """
    keys = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#", 1)[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None:
            raise ConfigError(
                f"{source}, line {number}: not of the form NAME:SHA256-OF-KEY (64 hexadecimal digits)",
                "`nexus-ray api-key NAME` prints such a line",
            )
        keys[found["digest"]] = found["name"]
    return keys


def keys_of_environment() -> dict[str, str]:
    """The keys in NEXUS_RAY_API_KEYS: lines, or parts between commas.

    Raises:
        ConfigError: a part is not of that form.
    """
    return parse_keys(os.environ.get(VARIABLE, "").replace(",", "\n").splitlines(), VARIABLE)


class KeyFile:
    """The keys of a file, read again when it changes, so that a key can be withdrawn while the service runs.

    Args:
        path: the file; None: there is none.
        others: keys that always hold.

    Raises:
        ConfigError: the file cannot be read or holds something else.
    """

    def __init__(self, path: Path | None, others: Mapping[str, str]) -> None:
        self._path = path
        self._others = dict(others)
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, str] = {}
        self.required = path is not None or bool(others)
        if path is not None:
            self._read(path)

    def owner(self, key: str) -> str | None:
        """The name of the key, None if it is none of these."""
        if self._path is not None:
            self._refresh(self._path)
        digest, owner = _digest(key), None
        for known, name in {**self._others, **self._keys}.items():
            if hmac.compare_digest(digest, known):
                owner = name  # no early end: the time says nothing about which key it is
        return owner

    def _refresh(self, path: Path) -> None:
        """Follow the file; while it is missing or garbled, no key of it holds."""
        try:
            if self._stamp != _stamp(path):
                self._read(path)
        except (OSError, ConfigError):
            self._keys, self._stamp = {}, None

    def _read(self, path: Path) -> None:
        try:
            self._stamp = _stamp(path)
            self._keys = parse_keys(path.read_text(encoding="utf-8").splitlines(), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"serve.api_keys: cannot read {path}: {error}") from error


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class RequireKey:
    """Lets only requests with a key through, but for what is public.

    Args:
        app: what answers them.
        keys: who may.
    """

    def __init__(self, app: ASGIApp, keys: KeyFile) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (ASGI)."""
        if scope["type"] != "http" or not self._keys.required or _is_public(path_of(scope)):
            await self._app(scope, receive, send)
            return
        given = _bearer(scope)
        owner = self._keys.owner(given) if given is not None else None
        if owner is None:
            what = "this service needs an API key: Authorization: Bearer KEY" if given is None else "wrong API key"
            refusal = error_response(ApiError(401, what, code="invalid_api_key", type="authentication_error"))
            await refusal(scope, receive, send)
            return
        if record := record_of(scope):
            record.client = owner
        await self._app(scope, receive, send)


def _is_public(path: str) -> bool:
    return path in _PUBLIC or path.startswith(_PUBLIC_FOLDER)


def _bearer(scope: Scope) -> str | None:
    header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
    kind, _, key = header.partition(" ")
    return key.strip() if kind.lower() == "bearer" and key.strip() else None
