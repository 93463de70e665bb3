"""The web page of the service: the files of `serve/web`, at `/` and `/web/`, and nothing else."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

WEB = Path(__file__).parent / "web"
_INDEX = "index.html"
# Said here, because with `nosniff` a module of any other type does not run, and a system's own table may have another.
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "object-src 'none'",
)
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "; ".join(_POLICY),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class WebFiles(StaticFiles):
    """Files of one folder and no others: of the known types, and not by way of links that lead out of it."""

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        """Where a file is, and what it is; a path that the system refuses (a loop of links, too long) is not found."""
        try:
            return super().lookup_path(path)
        except OSError:
            return "", None

    def file_response(
        self, full_path: str | PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        """The file, or 304 where the client has it.

        Raises:
            HTTPException: a file of this kind is no part of the page (404).
        """
        media_type = _TYPES.get(Path(full_path).suffix)
        if media_type is None:
            raise HTTPException(404)
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(_HEADERS)
        if response.status_code != 304:
            response.headers["Content-Type"] = media_type
        return response


def add_pages(api: FastAPI, directory: Path = WEB) -> None:
    """Serve the page at `/` and its files at `/web/NAME`.

    Args:
        api: the application; its handlers answer what is not found.
        directory: where the files are.
    """
    files = WebFiles(directory=directory)

    @api.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return await files.get_response(_INDEX, request.scope)

    @api.api_route(f"/web/{_INDEX}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page_by_name() -> Response:
        """The page names its files relative to `/`, so that it also works behind a proxy that adds a prefix."""
        return RedirectResponse("../")

    api.mount("/web", files, name="web")
