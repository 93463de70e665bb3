"""Arrays on disk with a description beside them: how calibration text and router statistics are stored.

`NAME.safetensors` holds the arrays, `NAME.json` says what they are. The description is written last and carries the
SHA-256 of the arrays' file, so that a pair of files from two different runs is never read.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, load_file, save

from nexus_ray.errors import ArtefactError
from nexus_ray.storage import Place, atomic_file, is_remote, read_bytes, read_json, sha256_file, write_json

Arrays = dict[str, NDArray[Any]]
REMAKE = "run `nexus-ray collect CONFIG` again"


class ArrayDescription(BaseModel):
    """What every description says.

    Attributes:
        format_version: of the pair of files.
        sha256: of the arrays' file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    sha256: str = ""


DescriptionT = TypeVar("DescriptionT", bound=ArrayDescription)


def to_bytes(arrays: Arrays) -> bytes:
    """Named arrays in the safetensors format."""
    return bytes(save({name: np.ascontiguousarray(values) for name, values in arrays.items()}))


def write_arrays(path: Place, arrays: Arrays) -> None:
    """Write named arrays as safetensors, atomically.

    Raises:
        StorageError: the file system refused, for example because it is full.
    """
    with atomic_file(path) as temporary:
        # not save_file: on a full disk it raises an error of its own, which says nothing of the file
        temporary.write_bytes(to_bytes(arrays))


def read_arrays(path: Place, what: str = "router statistics") -> Arrays:
    """Read named arrays from a safetensors file.

    Raises:
        ArtefactError: the file is missing or damaged.
    """
    try:
        return dict(load(read_bytes(path)) if is_remote(path) else load_file(path))
    except FileNotFoundError as error:
        raise ArtefactError(f"no {what} at {path}", REMAKE) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtefactError(f"the {what} at {path} are damaged: {error}", REMAKE) from error


def write_described(path: Place, arrays: Arrays, description: DescriptionT) -> DescriptionT:
    """Write the arrays to `path` and their description beside it; returns the description with the checksum."""
    write_arrays(path, arrays)
    stamped = description.model_copy(update={"sha256": sha256_file(path)})
    write_json(path.with_suffix(".json"), stamped.model_dump(mode="json"))
    return stamped


def read_description(path: Place, kind: type[DescriptionT], what: str) -> DescriptionT:
    """Read the description beside the arrays at `path`.

    Raises:
        ArtefactError: it is missing, damaged, of another kind or of another format version.
    """
    beside = path.with_suffix(".json")
    values = read_json(beside, what=what, hint=REMAKE)
    found = values.get("format_version") if isinstance(values, dict) else None
    expected = kind.model_fields["format_version"].default
    if found is not None and found != expected:
        raise ArtefactError(f"{beside} has format {found}, not {expected}", REMAKE)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ArtefactError(f"{beside} does not describe {what}: {error}", REMAKE) from error


def read_described(path: Place, kind: type[DescriptionT], what: str) -> tuple[DescriptionT, Arrays]:
    """Read the pair of files that `write_described` wrote.

    Raises:
        ArtefactError: one of them is missing, damaged, of another format or does not belong to the other.
    """
    description = read_description(path, kind, what)
    arrays = read_arrays(path, what)
    if sha256_file(path) != description.sha256:
        raise ArtefactError(f"{path} is not the file that the description beside it is about", REMAKE)
    return description, arrays
