"""Sizes of a base model, from its `config.json` and the headers of its files: no weight is read."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from nexus_ray.checkpoints.header import TensorSpec
from nexus_ray.checkpoints.reader import CheckpointReader, read_model_config
from nexus_ray.errors import ModelError
from nexus_ray.families import MoeDimensions, family_of
from nexus_ray.storage import Place

_VALUES_PER_BYTE = 2  # of MXFP4 blocks
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class TensorSizes:
    """Some tensors of a model: those of a layer, or those around the layers.

    Attributes:
        packed_bytes: MXFP4 blocks and scales in the files.
        packed_parameters: weights that they stand for.
        plain_parameters: number of elements of all other tensors, by stored type.
        largest_bytes: of one tensor in the files.
    """

    packed_bytes: int
    packed_parameters: int
    plain_parameters: Mapping[torch.dtype, int]
    largest_bytes: int

    @classmethod
    def of(cls, specs: Iterable[TensorSpec]) -> TensorSizes:
        """The sum of these tensors."""
        packed_bytes = packed_parameters = largest = 0
        plain: Counter[torch.dtype] = Counter()
        for spec in specs:
            largest = max(largest, spec.nbytes)
            if spec.name.endswith(("_blocks", "_scales")):
                packed_bytes += spec.nbytes
                packed_parameters += _VALUES_PER_BYTE * prod(spec.shape) if spec.name.endswith("_blocks") else 0
            else:
                plain[spec.dtype] += prod(spec.shape)
        return cls(packed_bytes, packed_parameters, dict(plain), largest)

    @property
    def stored_bytes(self) -> int:
        """Bytes in the files."""
        return self.packed_bytes + sum(count * dtype.itemsize for dtype, count in self.plain_parameters.items())


@dataclass(frozen=True)
class ModelSizes:
    """What decides the memory that a model takes.

    Attributes:
        dimensions: of its MoE layers.
        vocabulary: rows of the embedding.
        attention_heads: query heads.
        key_value_heads: key and value heads.
        head_dim: features of a head.
        sliding_window: tokens that a sliding layer looks back, None without such layers.
        sliding_layers: layers with a sliding window.
        context: most positions of a sequence.
        packed_bytes: MXFP4 blocks and scales in the files.
        packed_parameters: weights that they stand for.
        plain_parameters: number of elements of all other tensors, by stored type.
        largest_tensor_bytes: of one tensor in the files.
        layers: the tensors of each decoder layer.
        origin: where this was read: "files", or what stood in for them.
    """

    dimensions: MoeDimensions
    vocabulary: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    sliding_window: int | None
    sliding_layers: int
    context: int
    packed_bytes: int
    packed_parameters: int
    plain_parameters: Mapping[torch.dtype, int]
    largest_tensor_bytes: int
    layers: tuple[TensorSizes, ...] = ()
    origin: str = "files"

    @property
    def parameters(self) -> int:
        """Number of weights, packed ones counted unpacked."""
        return self.packed_parameters + sum(self.plain_parameters.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        return self.packed_bytes + sum(count * dtype.itemsize for dtype, count in self.plain_parameters.items())

    @property
    def attention_size(self) -> int:
        """Query heads times features of a head."""
        return self.attention_heads * self.head_dim

    def expert_parameters(self) -> int:
        """Weights of one routed expert's matrices."""
        return 3 * self.dimensions.hidden_size * self.dimensions.intermediate_size


def read_sizes(path: Place) -> ModelSizes:
    """Read the sizes of the model in a directory; reads `config.json` and file headers only.

    Raises:
        ModelError: the directory is missing, damaged or of an unsupported family.
    """
    config = read_model_config(path)
    return sizes_of(config, _specs(path), path=path)


def sizes_of(config: dict[str, Any], specs: Iterable[TensorSpec], *, path: Place, origin: str = "files") -> ModelSizes:
    """The sizes of a model with these tensors.

    Args:
        config: its `config.json`.
        specs: all of its tensors, named as in its files.
        path: of the model, for messages.
        origin: see `ModelSizes`.

    Raises:
        ModelError: the configuration lacks a field, or is of an unsupported family.
    """
    dimensions = family_of(config).dimensions(config)
    specs = list(specs)
    whole = TensorSizes.of(specs)
    try:
        return ModelSizes(
            dimensions=dimensions,
            **_attention(config, dimensions),
            packed_bytes=whole.packed_bytes,
            packed_parameters=whole.packed_parameters,
            plain_parameters=whole.plain_parameters,
            largest_tensor_bytes=whole.largest_bytes,
            layers=_layers(specs),
            origin=origin,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"model.path: {path}/config.json lacks or garbles {error}", "download it again") from error


def _specs(path: Place) -> list[TensorSpec]:
    """What the files' headers say."""
    with CheckpointReader(path) as reader:
        entries = {name: reader.entry(name) for name in reader.names}
    return [TensorSpec(name, entry.dtype, tuple(entry.shape)) for name, entry in entries.items()]


def _layers(specs: Iterable[TensorSpec]) -> tuple[TensorSizes, ...]:
    """The tensors of each decoder layer, in order."""
    found: dict[int, list[TensorSpec]] = defaultdict(list)
    for spec in specs:
        if match := _LAYER.search(spec.name):
            found[int(match[1])].append(spec)
    return tuple(TensorSizes.of(found[layer]) for layer in sorted(found))


def _attention(config: dict[str, Any], dimensions: MoeDimensions) -> dict[str, Any]:
    """The fields that `config.json` decides."""
    heads = int(config["num_attention_heads"])
    return {
        "vocabulary": int(config["vocab_size"]),
        "attention_heads": heads,
        "key_value_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or dimensions.hidden_size // heads),
        "sliding_window": config.get("sliding_window"),
        "sliding_layers": list(config.get("layer_types") or []).count("sliding_attention"),
        "context": int(config["max_position_embeddings"]),
    }
