"""The shared experts' tensors of an export, taken out of the stream in which an engine reads its files.

vLLM hands a model every tensor of every file, whatever the index says, and its GPT-OSS loader passes over names that
it does not know. So the tensors that make the student are counted here: each one comes, once, and none besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from nexus_ray.checkpoints.overlay import ROUTERS, OverlayConfig, overlay_specs
from nexus_ray.errors import ArtefactError
from nexus_ray.huggingface.export import exported_name

Weights = Iterable[tuple[str, Tensor]]

SHARED_EXPERT = ".shared_expert."
EXPORT_AGAIN = (
    "`nexus-ray merge-check DIR` says more; export it again with `nexus-ray export CONFIG --output DIR --overwrite`"
)
_NAMED = 4
_FIELDS = frozenset(OverlayConfig.model_fields)


def described(config: Mapping[str, Any]) -> OverlayConfig:
    """What config.json says about the overlay that was exported.

    Raises:
        ArtefactError: nothing, or not what an export writes.
    """
    shared = config.get("shared_experts")
    if not isinstance(shared, dict):
        raise ArtefactError("config.json: shared_experts is missing", EXPORT_AGAIN)
    try:
        description = OverlayConfig(**{name: value for name, value in shared.items() if name in _FIELDS})
    except ValueError as error:
        raise ArtefactError(f"config.json: shared_experts is not what export writes: {error}", EXPORT_AGAIN) from error
    layers = config.get("num_hidden_layers")
    if description.layers != layers:
        found = f"config.json: shared_experts is for {description.layers} layers, the model has {layers}"
        raise ArtefactError(found, EXPORT_AGAIN)
    return description


class SharedTensors:
    """The shared experts' tensors of a checkpoint, which must be exactly those that its configuration promises.

    Args:
        description: of the overlay that was exported.
        parameters: {name in the export: parameter} to fill; with pipeline parallelism, of this process's layers only.
    """

    def __init__(self, description: OverlayConfig, parameters: Mapping[str, nn.Parameter]) -> None:
        specs = [spec for spec in overlay_specs(description) if not spec.name.startswith(ROUTERS)]
        self._expected = {exported_name(spec.name): tuple(spec.shape) for spec in specs}
        self._missing = set(self._expected)
        self._parameters = parameters
        assert set(parameters) <= self._missing, "the model has parameters that no export fills"

    def taken_from(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """All other tensors; the shared experts' fill their parameters on the way.

        Raises:
            ArtefactError: one of these is not expected, comes twice, or has another shape.
        """
        for name, tensor in weights:
            if SHARED_EXPERT in name:
                self._fill(name, tensor)
            else:
                yield name, tensor

    def require_complete(self) -> None:
        """Do nothing when every expected tensor has come.

        Raises:
            ArtefactError: some are missing; the message names them.
        """
        if self._missing:
            count = f"{len(self._missing)} of {len(self._expected)}"
            missing = f"the export lacks {count} tensors of its shared experts: {listed(self._missing)}"
            raise ArtefactError(missing, EXPORT_AGAIN)

    def _fill(self, name: str, tensor: Tensor) -> None:
        shape = self._expected.get(name)
        if shape is None:
            raise ArtefactError(f"{name} belongs to no shared expert that config.json describes", EXPORT_AGAIN)
        if name not in self._missing:
            raise ArtefactError(f"{name} is in the export twice", EXPORT_AGAIN)
        if tuple(tensor.shape) != shape:
            raise ArtefactError(f"{name} is {list(tensor.shape)}, config.json says {list(shape)}", EXPORT_AGAIN)
        self._missing.remove(name)
        if name in self._parameters:
            self._parameters[name].data.copy_(tensor)


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - _NAMED
    return ", ".join(ordered[:_NAMED]) + (f" and {more} more" if more > 0 else "")
