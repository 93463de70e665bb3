"""The router statistics of a run: moments of every source and what they were made from."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from nexus_ray.data.coverage import CalibrationSample
from nexus_ray.errors import ArtefactError
from nexus_ray.router.files import REMAKE, ArrayDescription, Arrays, read_described, write_described
from nexus_ray.router.moments import RouterMoments
from nexus_ray.storage import Place

FORMAT_VERSION = 3
_WHAT = "router statistics"


class Description(ArrayDescription):
    """What `router_stats.json` says.

    Attributes:
        base_fingerprint: identity of the base model.
        overlay_sha256: identity of the shared experts that took part; None for the base alone.
        tokenizer_sha256: identity of the base's vocabulary.
        sequence_length: tokens of a packed sequence.
        layers: MoE layers.
        experts: routed experts of a layer.
        experts_per_token: experts the router selects for a token.
        tokens: tokens of each source.
        compute: device, type and experts that the model was computed with.
        calibration_sha256: identity of the calibration text.
        calibration: how the text of each source was chosen.
    """

    format_version: int = FORMAT_VERSION
    base_fingerprint: str
    overlay_sha256: str | None = None
    tokenizer_sha256: str
    sequence_length: int
    layers: int
    experts: int
    experts_per_token: int
    tokens: dict[str, int]
    compute: dict[str, str] = Field(default_factory=dict)
    calibration_sha256: str = ""
    calibration: dict[str, CalibrationSample] = Field(default_factory=dict)


@dataclass(frozen=True)
class RouterStatistics:
    """Description and moments by source."""

    description: Description
    sources: dict[str, RouterMoments]

    def save(self, path: Place) -> None:
        """Write the safetensors file `path` and the description beside it."""
        arrays: Arrays = {}
        for name, moments in self.sources.items():
            arrays |= moments.arrays(f"{name}.")
        write_described(path, arrays, self.description)

    @classmethod
    def load(cls, path: Place) -> RouterStatistics:
        """Read the pair of files that `save` wrote.

        Raises:
            ArtefactError: one of them is missing, damaged, of another format or does not belong to the other.
        """
        description, arrays = read_described(path, Description, _WHAT)
        try:
            sources = {name: RouterMoments.from_arrays(arrays, f"{name}.") for name in description.tokens}
        except KeyError as error:
            raise ArtefactError(f"{path} lacks {error}", REMAKE) from error
        return cls(description, sources)
