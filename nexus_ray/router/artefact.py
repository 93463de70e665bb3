"""The router statistics of a run: moments of every source and what they were made from.

`router_stats.safetensors` holds the moments, `router_stats.json` the description. The description is written last
and carries the SHA-256 of the tensors, so that a pair from two different runs is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from nexus_ray.errors import ArtefactError
from nexus_ray.router.moments import REMAKE, RouterMoments, read_arrays, write_arrays
from nexus_ray.storage import read_json, sha256_file, write_json

FORMAT_VERSION = 2


class Description(BaseModel):
    """What `router_stats.json` says.

    Attributes:
        format_version: of this pair of files.
        base_fingerprint: identity of the base model.
        tokenizer_sha256: identity of its vocabulary.
        sequence_length: tokens of a packed sequence.
        layers: MoE layers.
        experts: routed experts of a layer.
        experts_per_token: experts the router selects for a token.
        tokens: tokens of each source.
        sha256: of the safetensors file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    base_fingerprint: str
    tokenizer_sha256: str
    sequence_length: int
    layers: int
    experts: int
    experts_per_token: int
    tokens: dict[str, int]
    sha256: str = ""


@dataclass(frozen=True)
class RouterStatistics:
    """Description and moments by source."""

    description: Description
    sources: dict[str, RouterMoments]

    def save(self, path: Path) -> None:
        """Write the safetensors file `path` and the description beside it."""
        arrays: dict[str, NDArray[np.generic]] = {}
        for name, moments in self.sources.items():
            arrays |= moments.arrays(f"{name}.")
        write_arrays(path, arrays)
        description = self.description.model_copy(update={"sha256": sha256_file(path)})
        write_json(path.with_suffix(".json"), description.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> RouterStatistics:
        """Read the pair of files that `save` wrote.

        Raises:
            ArtefactError: one of them is missing, damaged, of another format or does not belong to the other.
        """
        description = _read_description(path.with_suffix(".json"))
        arrays = read_arrays(path)
        if sha256_file(path) != description.sha256:
            raise ArtefactError(f"{path} is not the file that the description beside it is about", REMAKE)
        try:
            sources = {name: RouterMoments.from_arrays(arrays, f"{name}.") for name in description.tokens}
        except KeyError as error:
            raise ArtefactError(f"{path} lacks {error}", REMAKE) from error
        return cls(description, sources)


def _read_description(path: Path) -> Description:
    values = read_json(path, what="router statistics", hint=REMAKE)
    try:
        description = Description.model_validate(values)
    except ValidationError as error:
        raise ArtefactError(f"{path} does not describe router statistics: {error}", REMAKE) from error
    if description.format_version != FORMAT_VERSION:
        raise ArtefactError(f"{path} has format {description.format_version}, not {FORMAT_VERSION}", REMAKE)
    return description
