"""A worker that holds the model: what every stage's memory is made of, on each of its devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from nexus_ray.config import Config
from nexus_ray.planning.activations import Workload, layer_working
from nexus_ray.planning.needs import MIB, Device, Part, Phase, StageNeeds
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.target_sizes import SourceTargets, source_targets
from nexus_ray.planning.text import SourceText
from nexus_ray.planning.weights import (
    BaseWeights,
    OverlaySize,
    base_part,
    base_weights,
    layers_of_devices,
    overlay_size,
    overlay_width,
)

FLOAT32 = 4
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Anonymous memory (RssAnon in /proc/self/status) of a process apart from its tensors, measured on Linux.
WORKER_PROCESS = 360 * MIB  # a Ray actor that has imported nexus_ray.training.distil and ray.train
CUDA_CONTEXT = 500 * MIB  # driver context and kernels on each device; assumed, not measured
_KERNELS = 18 * MIB  # compiled kernels of the shapes that `memory.py` lets oneDNN keep, and tables


@dataclass(frozen=True)
class Worker:
    """What all stages of a run with a model in memory have in common.

    Attributes:
        config: the run, as its stage sees it.
        sizes: of the base.
        device: where the model is.
        devices: how many one worker spreads it over.
        dtype: of the model's computation.
        weights: of the base.
        overlay: counts of the shared experts.
        targets: of the teacher, by source.
        layers: the decoder layers of each device (`modeling/placement.py`).
        at: the device that parts are of: the first one also holds embedding, last norm and LM head.
    """

    config: Config
    sizes: ModelSizes
    device: Device
    devices: int
    dtype: torch.dtype
    weights: BaseWeights
    overlay: OverlaySize
    targets: dict[str, SourceTargets]
    layers: tuple[tuple[int, ...], ...]
    at: int = 0

    @classmethod
    def of(cls, config: Config, sizes: ModelSizes, text: Mapping[str, SourceText] | None = None) -> Worker:
        """The worker of a run as one stage sees it; `text`: training text by source, as far as it is known."""
        device, dtype = config.compute_device, dtype_of(config)
        weights = base_weights(sizes, packed=config.model.experts == "packed", dtype=dtype, device=device)
        devices = max(1, int(config.resources.gpus_per_worker)) if device == "cuda" else 1
        layers = layers_of_devices(sizes, devices)
        targets = source_targets(config, sizes, text or {})
        return cls(config, sizes, device, devices, dtype, weights, overlay_size(sizes, config), targets, layers)

    @property
    def is_first(self) -> bool:
        """Whether the device holds embedding, last norm and LM head, and so what belongs to logits and losses."""
        return self.at == 0

    def share(self, size: int) -> int:
        """This device's part of what lies beside the layers, evenly: shared experts, moments, activations."""
        return size * len(self.layers[self.at]) // self.sizes.dimensions.layers

    def each_device(self, phases: Callable[[Worker], list[Phase]]) -> tuple[tuple[Phase, ...], ...]:
        """The phases of every device of the worker."""
        return tuple(tuple(phases(replace(self, at=device))) for device in range(self.devices))

    def own_weights(self) -> int:
        """Bytes of the base on this device."""
        if self.devices == 1:
            return self.weights.own
        packed = self.config.model.experts == "packed"
        of = [base_weights(each, packed=packed, dtype=self.dtype, device=self.device).own for each in self.sizes.layers]
        mine = sum(of[layer] for layer in self.layers[self.at])
        return mine + (self.weights.own - sum(of) if self.is_first else 0)

    @property
    def workers(self) -> int:
        """How many of them its stage has."""
        return self.config.resources.workers

    def work(self, sequences: int, length: int | None = None) -> Workload:
        """A forward pass of this many sequences."""
        convert = self.config.convert
        return Workload(
            sequences=sequences,
            length=length or self.config.data.sequence_length,
            itemsize=self.dtype.itemsize,
            experts=self.config.model.experts,
            width=overlay_width(self.sizes, self.config),
            token_gate=convert.token_gate,
            learn_scale=convert.learn_scale,
            routers=self.config.train.routers.train,
            checkpointed=self.config.train.gradient_checkpointing,
        )

    def fixed(self) -> tuple[Part, Part]:
        """The process and the base's weights, on one device."""
        process = Part("process", WORKER_PROCESS + _KERNELS, "interpreter, torch, transformers, Ray")
        if self.device == "cuda":
            process = Part("CUDA context", CUDA_CONTEXT)
        packed = self.config.model.experts == "packed"
        return process, base_part(self.sizes, self.own_weights(), packed=packed, dtype=self.dtype)

    def logits(self, sequences: int, length: int | None = None, itemsize: int | None = None) -> int:
        """Bytes of [sequences, length, vocabulary] values, by default in the compute type."""
        tokens = sequences * (length or self.config.data.sequence_length)
        return tokens * self.sizes.vocabulary * (itemsize or self.dtype.itemsize)

    def activation_block(self, sequences: int, length: int | None = None) -> int:
        """Bytes of the largest activations of a layer."""
        work = self.work(sequences, length)
        return work.tokens * max(2 * work.width * work.itemsize, self.sizes.dimensions.hidden_size * FLOAT32)

    def stage(self, name: str, processes: int, phases: Callable[[Worker], list[Phase]], host: int = 0) -> StageNeeds:
        """The needs of a stage whose workers hold the model.

        Args:
            name: of the stage.
            processes: workers.
            phases: of one device of a worker.
            host: what a worker holds beside them in the host's memory when it is on a GPU.
        """
        gpus = self.config.resources.gpus_per_worker
        of_devices = self.each_device(phases)
        return StageNeeds(
            stage=name,
            processes=processes,
            device=self.device,
            devices=self.devices,
            phases=max(of_devices, key=_worst),
            of_devices=of_devices if self.devices > 1 else (),
            layers=self.layers,
            mapped=self.weights.mapped,
            host=WORKER_PROCESS + max(self.loading(), host) if self.device == "cuda" else 0,
            sharing=int(1 / gpus) if 0 < gpus < 1 else 1,
        )

    def loading(self) -> int:
        """Host memory on the way to a GPU: the largest tensor, unpacked where the model wants it so."""
        if self.config.model.experts == "packed":
            return self.sizes.largest_tensor_bytes
        unpacked = 2 * self.sizes.expert_parameters() // 3 * self.sizes.dimensions.experts * self.dtype.itemsize
        return max(self.sizes.largest_tensor_bytes, unpacked)

    def shared_experts(self) -> Part:
        """This device's share of the shared experts and router differences: float32 masters."""
        note = f"{self.overlay.parameters:,} parameters, float32"
        return Part("shared experts", self.share(self.overlay.parameters * FLOAT32), note)

    def overlay_loading(self) -> int:
        """Host memory of an overlay on its way to a GPU: as stored, and in float32."""
        return self.overlay.stored_bytes + self.overlay.parameters * FLOAT32

    def stream(self, sequences: int, length: int | None = None) -> int:
        """What a layer that keeps nothing has beside its largest step: the residual stream and copies of it."""
        return 4 * self.work(sequences, length).tokens * self.sizes.dimensions.hidden_size * FLOAT32

    def forward(self, sequences: int, length: int | None = None) -> Part:
        """Activations of a pass without gradients: the residual stream, one layer at work, all router logits."""
        work, dimensions = self.work(sequences, length), self.sizes.dimensions
        size = self.stream(sequences, length) + layer_working(self.sizes, work)
        size += work.tokens * dimensions.layers * dimensions.experts * FLOAT32
        return Part("activations", size, f"{work.tokens:,} tokens", self.activation_block(sequences, length))


def dtype_of(config: Config) -> torch.dtype:
    """Of the model's computation."""
    return _DTYPES[config.compute_dtype]


def _worst(phases: tuple[Phase, ...]) -> int:
    return max((each.total for each in phases), default=0)
