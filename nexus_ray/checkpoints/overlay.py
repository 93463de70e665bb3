"""Overlays: the trained tensors of a specialisation and a description, without the base.

`overlay_config.json` says which base they belong to and what shape they have; `overlay.safetensors` holds the
shared experts' tensors as `layers.N.<parameter>`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nexus_ray.errors import ArtefactError
from nexus_ray.storage import atomic_directory, read_json, write_json

FORMAT_VERSION = 1
_CONFIG = "overlay_config.json"
_TENSORS = "overlay.safetensors"
_REMAKE = "run `nexus-ray run CONFIG`"


class OverlayConfig(BaseModel):
    """What an overlay is and which base it belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    base_fingerprint: str
    model_type: str
    layers: int
    hidden_size: int
    width: int
    token_gate: bool
    scale: float
    learn_scale: bool
    initialisation: str
    trained_steps: int = 0

    @property
    def parameters(self) -> int:
        """Number of parameters of all shared experts, output scales included."""
        mlp = 3 * self.hidden_size * self.width + 2 * self.width + self.hidden_size
        gate = self.hidden_size + 1 if self.token_gate else 0
        return self.layers * (mlp + gate + 1)


def save_overlay(directory: Path, config: OverlayConfig, tensors: dict[str, Tensor]) -> None:
    """Write an overlay atomically; one that stood there is replaced."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_directory(directory) as temporary:
        save_file(plain, temporary / _TENSORS, metadata={"format": "pt"})
        write_json(temporary / _CONFIG, config.model_dump())


def load_overlay_config(directory: Path) -> OverlayConfig:
    """Read the description of an overlay.

    Raises:
        ArtefactError: it is missing, damaged or of another format version.
    """
    values: Any = read_json(directory / _CONFIG, what="overlay", hint=_REMAKE)
    try:
        config = OverlayConfig.model_validate(values)
    except ValidationError as error:
        raise ArtefactError(f"{directory / _CONFIG} is not an overlay description: {error}", _REMAKE) from error
    if config.format_version != FORMAT_VERSION:
        raise ArtefactError(f"{directory} has overlay format {config.format_version}, not {FORMAT_VERSION}", _REMAKE)
    return config


def load_overlay(directory: Path, base_fingerprint: str) -> tuple[OverlayConfig, dict[str, Tensor]]:
    """Read an overlay for a base.

    Raises:
        ArtefactError: it is missing or damaged, or belongs to another base.
    """
    config = load_overlay_config(directory)
    if config.base_fingerprint != base_fingerprint:
        raise ArtefactError(
            f"the overlay {directory} was made for the base {config.base_fingerprint[:12]}, "
            f"but model.path is {base_fingerprint[:12]}",
            "set model.path to the base it was made for, or make a new overlay with `nexus-ray run CONFIG`",
        )
    try:
        return config, load_file(directory / _TENSORS)
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{directory / _TENSORS} cannot be read: {error}", _REMAKE) from error
