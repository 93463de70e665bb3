"""Where something is kept: a local path, or a URI of any storage that fsspec opens (`s3://bucket/run`).

Both answer to the same methods (`/`, `exists`, `read_text`, `open`, `stat`, `unlink`, ...). A remote place is no
`os.PathLike`: a library that writes files of its own refuses it instead of making a directory called "s3:".
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, PlainSerializer
from pydantic_core import PydanticCustomError
from typing_extensions import TypeIs
from upath import UPath

Place: TypeAlias = Path | UPath

# Listings kept in memory would not show what other nodes have written since.
_OPTIONS: dict[str, Any] = {"use_listings_cache": False}
# botocore and s3fs repeat requests, one inside the other; `storage.retries` does so with more patience, and says so.
_FEW_RETRIES: dict[str, Any] = {"config_kwargs": {"retries": {"mode": "standard", "max_attempts": 1}}}
_OPTIONS_OF: dict[str, dict[str, Any]] = {"s3": _FEW_RETRIES, "s3a": _FEW_RETRIES}


def place_of(value: str | Place) -> Place:
    """A local path as `Path`, anything with a scheme as `UPath`; `file://` is local.

    Raises:
        ValueError: nothing installed here opens this kind of URI.
    """
    if isinstance(value, (Path, UPath)) and not _is_uri(str(value)):
        return Path(str(value))
    text = str(value)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    if not _is_uri(text):
        return Path(text)
    scheme = text.partition("://")[0]
    try:
        place = UPath(text, **_OPTIONS, **_OPTIONS_OF.get(scheme, {}))
        place.fs  # noqa: B018  # opens nothing yet, but imports the package that would
    except ImportError as error:
        raise ValueError(f"{text}: {error}; {_hint(scheme)}") from error
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from error
    if isinstance(place, Path):  # what UPath makes of a scheme that it does not take for one
        raise ValueError(f"{text}: {scheme!r} is no kind of storage")  # noqa: TRY004  # as the other failures
    return place


def is_remote(place: Place) -> TypeIs[UPath]:
    """Whether it is not on a file system of this machine."""
    return not isinstance(place, Path)


def _is_uri(text: str) -> bool:
    return "://" in text


def _hint(scheme: str) -> str:
    extras = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
    return f"pip install 'nexus-ray[{extras[scheme]}]'" if scheme in extras else "install that package"


def _parse(value: Any) -> Any:
    if not isinstance(value, (str, Path, UPath)):
        return value
    try:
        return place_of(value)
    except ValueError as error:
        raise PydanticCustomError("place", "{reason}", {"reason": str(error)}) from error


# A field of a configuration: written and dumped as the text it was given as.
PlaceField = Annotated[
    Place, BeforeValidator(_parse), PlainSerializer(str, return_type=str, when_used="json-unless-none")
]
