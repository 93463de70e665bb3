"""Overlays: the trained tensors of a specialisation and a description, without the base.

`overlay_config.json` says which base they belong to and what shape they have; `overlay.safetensors` (or several such
files with an index, when large) holds the shared experts' tensors as `layers.N.<parameter>` and, where routers were
trained, their differences from the base's as `routers.N.weight` and `routers.N.bias`.
"""

from __future__ import annotations

from contextlib import ExitStack
from math import prod
from types import TracebackType
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from nexus_ray.checkpoints.header import TensorSpec
from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.checkpoints.writer import CheckpointWriter
from nexus_ray.errors import ArtefactError, ModelError
from nexus_ray.storage import Place, atomic_directory, local_directory, member, read_json, write_json

FORMAT_VERSION = 2
STEM = "overlay"
CONFIG_FILE = "overlay_config.json"
_REMAKE = "run `nexus-ray run CONFIG`"
_SHARD_BYTES = 5_000_000_000
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_MOST_LAYERS = 10_000
_MOST_FEATURES = 2**24
ROUTERS = "routers."  # what names of router differences begin with
TrainedKind = Literal["none", "bias", "all"]
_KINDS: tuple[TrainedKind, ...] = ("none", "bias", "all")


class OverlayConfig(BaseModel):
    """What an overlay is and which base it belongs to."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format_version: int = FORMAT_VERSION
    base_fingerprint: str
    model_type: str
    layers: int = Field(ge=0, le=_MOST_LAYERS)
    hidden_size: int = Field(ge=1, le=_MOST_FEATURES)
    width: int = Field(ge=1, le=_MOST_FEATURES)
    token_gate: bool
    scale: float
    learn_scale: bool
    initialisation: str
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    trained_steps: int = 0
    routers: TrainedKind = "none"
    experts: int | None = Field(None, ge=1, le=_MOST_FEATURES)

    @model_validator(mode="after")
    def _counts_experts(self) -> Self:
        if self.routers != "none" and self.experts is None:
            raise ValueError("an overlay with routers says how many `experts` they choose from")
        return self

    @property
    def parameters(self) -> int:
        """Number of parameters: of all shared experts, output scales included, and of the router differences."""
        mlp = 3 * self.hidden_size * self.width + 2 * self.width + self.hidden_size
        gate = self.hidden_size + 1 if self.token_gate else 0
        routers = sum(prod(spec.shape) for spec in router_specs(self))
        return self.layers * (mlp + gate + 1) + routers

    def with_routers(self, routers: TrainedKind, experts: int) -> Self:
        """The same overlay with differences of these routers too; it loses none that it has."""
        if _KINDS.index(routers) <= _KINDS.index(self.routers):
            return self
        return self.model_copy(update={"routers": routers, "experts": experts})


def overlay_specs(config: OverlayConfig) -> list[TensorSpec]:
    """Name, type and shape of every tensor of an overlay: `config.dtype`, but float32 for scales and routers."""
    dtype = _DTYPES[config.dtype]
    hidden, width = config.hidden_size, config.width
    shapes: dict[str, tuple[int, ...]] = {
        "gate_up_proj.weight": (2 * width, hidden),
        "gate_up_proj.bias": (2 * width,),
        "down_proj.weight": (hidden, width),
        "down_proj.bias": (hidden,),
    }
    if config.token_gate:
        shapes |= {"token_gate.weight": (1, hidden), "token_gate.bias": (1,)}
    specs = []
    for layer in range(config.layers):
        specs += [TensorSpec(f"layers.{layer}.{name}", dtype, shape) for name, shape in shapes.items()]
        specs.append(TensorSpec(f"layers.{layer}.scale", torch.float32, ()))
    return specs + router_specs(config)


def router_specs(config: OverlayConfig) -> list[TensorSpec]:
    """Name, type and shape of every router difference of an overlay: float32, since they decide between experts."""
    if config.routers == "none" or config.experts is None:
        return []
    shapes: dict[str, tuple[int, ...]] = {"bias": (config.experts,)}
    if config.routers == "all":
        shapes["weight"] = (config.experts, config.hidden_size)
    return [
        TensorSpec(f"{ROUTERS}{layer}.{name}", torch.float32, shape)
        for layer in range(config.layers)
        for name, shape in shapes.items()
    ]


def add_routers(
    config: OverlayConfig, tensors: dict[str, Tensor], routers: TrainedKind, experts: int
) -> tuple[OverlayConfig, dict[str, Tensor]]:
    """An overlay with router differences of zero for those of `routers` that it has none for.

    Args:
        config: the overlay's description.
        tensors: all of its tensors.
        routers: what it shall have at least.
        experts: number of routed experts of a layer.
    """
    wider = config.with_routers(routers, experts)
    zeros = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in router_specs(wider)}
    return wider, zeros | tensors


class OverlayWriter:
    """Writes an overlay tensor by tensor; it takes the place of `directory` when the block ends without exception.

    Use it as a context manager.

    Args:
        directory: where the overlay goes; one that stands there is replaced.
        config: what the overlay is.
        shard_bytes: most bytes of tensors in one file.

    Raises:
        ValueError: a tensor was not written.
        StorageError: the file system refused; what stood in `directory` stays.
    """

    def __init__(self, directory: Place, config: OverlayConfig, shard_bytes: int = _SHARD_BYTES) -> None:
        self._directory = directory
        self._config = config
        self._shard_bytes = shard_bytes
        self._dtypes = {spec.name: spec.dtype for spec in overlay_specs(config)}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_directory(self._directory))
            write_json(temporary / CONFIG_FILE, self._config.model_dump())
            specs = overlay_specs(self._config)
            writer = CheckpointWriter(temporary, specs, stem=STEM, shard_bytes=self._shard_bytes)
            self._writer = stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, rounded to the overlay's type.

        Raises:
            ArtefactError: it has values that are not finite.
            ValueError: the overlay has no such tensor, or of another shape.
            StorageError: the file system refused, e.g. the disk is full.
        """
        stored = tensor.detach().to(self._dtypes.get(name, tensor.dtype))
        if not _is_finite(stored):
            raise ArtefactError(
                f"{name} of the overlay has values that are not finite",
                "the training has diverged (lower train.optimiser.learning_rate), or the base is damaged: check it",
            )
        self._writer.write(name, stored)


def save_overlay(directory: Place, config: OverlayConfig, tensors: dict[str, Tensor]) -> None:
    """Write an overlay atomically, in `config.dtype`; one that stood there is replaced.

    Raises:
        ArtefactError: a tensor has values that are not finite.
        ValueError: the tensors are not those of `overlay_specs(config)`.
        StorageError: the file system refused.
    """
    with OverlayWriter(directory, config) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def load_overlay_config(directory: Place) -> OverlayConfig:
    """Read the description of an overlay.

    Raises:
        ArtefactError: it is missing, damaged or of another format version.
    """
    values: Any = read_json(member(directory, CONFIG_FILE), what="overlay", hint=_REMAKE)
    version = values.get("format_version", FORMAT_VERSION) if isinstance(values, dict) else FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise ArtefactError(f"{directory} has overlay format {version}, not {FORMAT_VERSION}", _REMAKE)
    try:
        return OverlayConfig.model_validate(values)
    except ValidationError as error:
        raise ArtefactError(f"{directory / CONFIG_FILE} is not an overlay description: {error}", _REMAKE) from error


def load_overlay(directory: Place, base_fingerprint: str) -> tuple[OverlayConfig, dict[str, Tensor]]:
    """Read an overlay for a base; its tensors are in the type they are stored in.

    Raises:
        ArtefactError: it is missing or damaged, belongs to another base, or its tensors are not those that its
            description promises; names the tensor.
    """
    config = load_overlay_config(directory)
    if config.base_fingerprint != base_fingerprint:
        raise ArtefactError(
            f"the overlay {directory} was made for the base {config.base_fingerprint[:12]}, "
            f"but model.path is {base_fingerprint[:12]}",
            "set model.path to the base it was made for, or make a new overlay with `nexus-ray run CONFIG`",
        )
    try:
        with CheckpointReader(local_directory(directory), stem=STEM) as reader:
            specs = overlay_specs(config)
            _check_names(directory, specs, reader)
            return config, {spec.name: _read_checked(directory, spec, reader) for spec in specs}
    except ModelError as error:
        raise ArtefactError(f"the overlay {directory} cannot be read: {error.message}", _REMAKE) from error


def _check_names(directory: Place, specs: list[TensorSpec], reader: CheckpointReader) -> None:
    expected, found = {spec.name for spec in specs}, set(reader.names)
    if expected != found:
        missing, extra = sorted(expected - found), sorted(found - expected)
        problem = f"lacks {missing[0]}, which" if missing else f"has {extra[0]}, which"
        promise = "promises" if missing else "does not have"
        raise ArtefactError(f"the overlay {directory} {problem} its description {promise}", _REMAKE)


def _read_checked(directory: Place, spec: TensorSpec, reader: CheckpointReader) -> Tensor:
    entry = reader.entry(spec.name)
    if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
        raise ArtefactError(
            f"{spec.name} of the overlay {directory} is {entry.dtype} {list(entry.shape)}, "
            f"its description says {spec.dtype} {list(spec.shape)}",
            _REMAKE,
        )
    tensor = reader.read(spec.name)
    if not _is_finite(tensor):
        raise ArtefactError(f"{spec.name} of the overlay {directory} has values that are not finite", _REMAKE)
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity: both reach the extremes, which cost one pass and no memory (isfinite: 30 times that)."""
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low) and torch.isfinite(high))
