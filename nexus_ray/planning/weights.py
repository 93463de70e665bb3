"""What the frozen base and the overlay take in memory, by how the model is loaded (`modeling/weights.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from nexus_ray.checkpoints.overlay import overlay_specs
from nexus_ray.config import Config
from nexus_ray.conversion.plan import describe_overlay
from nexus_ray.modeling.placement import split_layers
from nexus_ray.modeling.trained import is_trained
from nexus_ray.planning.needs import Device, Part
from nexus_ray.planning.optimiser import moment_bytes
from nexus_ray.planning.sizes import ModelSizes, TensorSizes

_FLOAT32 = 4


@dataclass(frozen=True)
class BaseWeights:
    """Bytes of the base in a worker.

    Attributes:
        own: in the worker's own memory.
        mapped: views of the mapped files, one copy a node.
    """

    own: int
    mapped: int


@dataclass(frozen=True)
class OverlaySize:
    """Counts of an overlay.

    Attributes:
        parameters: all of them.
        trained: those with a gradient.
        largest: elements of the largest tensor.
        stored_bytes: in its file.
        moments: bytes of what the optimiser remembers of those that are trained.
    """

    parameters: int
    trained: int
    largest: int
    stored_bytes: int
    moments: int


def base_weights(sizes: ModelSizes | TensorSizes, *, packed: bool, dtype: torch.dtype, device: Device) -> BaseWeights:
    """Bytes of the base's weights, or of some of its tensors.

    On a CPU a tensor whose stored type is the model's stays in the mapped file; a cast or unpacked one is the
    worker's own. On a GPU everything is the device's own.
    """
    own = mapped = 0
    for stored, count in sizes.plain_parameters.items():
        if device == "cpu" and stored == dtype:
            mapped += count * dtype.itemsize
        else:
            own += count * dtype.itemsize
    if not packed:
        own += sizes.packed_parameters * dtype.itemsize
    elif device == "cpu":
        mapped += sizes.packed_bytes
    else:
        own += sizes.packed_bytes
    return BaseWeights(own, mapped)


def layers_of_devices(sizes: ModelSizes, devices: int) -> tuple[tuple[int, ...], ...]:
    """The layers of each device of a worker, as `modeling/weights.py` places them; a device may get none."""
    count = sizes.dimensions.layers
    if devices == 1:
        return (tuple(range(count)),)
    stored = [layer.stored_bytes for layer in sizes.layers]
    placed = split_layers(stored, sizes.stored_bytes - sum(stored), devices)
    return tuple(tuple(layer for layer in range(count) if placed[layer] == device) for device in range(devices))


def overlay_size(sizes: ModelSizes, config: Config) -> OverlaySize:
    """Counts of the overlay that training will write: what `convert` writes, and differences of trained routers."""
    routers, learn_scale = config.train.routers.train, config.convert.learn_scale
    converted = describe_overlay(config, sizes.dimensions, model_type="", base="")
    specs = overlay_specs(converted.with_routers(routers, sizes.dimensions.experts))
    counts = {spec.name: prod(spec.shape) for spec in specs}
    trained = [count for name, count in counts.items() if is_trained(name, learn_scale=learn_scale, routers=routers)]
    return OverlaySize(
        parameters=sum(counts.values()),
        trained=sum(trained),
        largest=max(counts.values()),
        stored_bytes=sum(spec.nbytes for spec in specs),
        moments=sum(moment_bytes(count, config.train.optimiser.name) for count in trained),
    )


def overlay_width(sizes: ModelSizes, config: Config) -> int:
    """Intermediate size of the shared experts."""
    return config.convert.width or sizes.dimensions.intermediate_size


def base_part(sizes: ModelSizes, own: int, *, packed: bool, dtype: torch.dtype) -> Part:
    """The part of the base that is the worker's, or one device's, own."""
    kind = str(dtype).removeprefix("torch.")
    how = "experts as stored" if packed and sizes.packed_bytes else "experts unpacked"
    return Part("base weights", own, f"{sizes.parameters:,} parameters; {how}, the rest {kind}")
