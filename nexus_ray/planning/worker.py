"""A worker that holds the model: what every stage's memory is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    overlay_part,
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
    """

    config: Config
    sizes: ModelSizes
    device: Device
    devices: int
    dtype: torch.dtype
    weights: BaseWeights
    overlay: OverlaySize
    targets: dict[str, SourceTargets]

    @classmethod
    def of(cls, config: Config, sizes: ModelSizes, text: Mapping[str, SourceText] | None = None) -> Worker:
        """The worker of a run as one stage sees it; `text`: training text by source, as far as it is known."""
        device, dtype = config.compute_device, _DTYPES[config.compute_dtype]
        weights = base_weights(sizes, packed=config.model.experts == "packed", dtype=dtype, device=device)
        devices = max(1, int(config.resources.gpus_per_worker))
        targets = source_targets(config, sizes, text or {})
        return cls(config, sizes, device, devices, dtype, weights, overlay_size(sizes, config), targets)

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
        return process, base_part(self.sizes, self.weights, packed=packed, dtype=self.dtype, devices=self.devices)

    def logits(self, sequences: int, length: int | None = None, itemsize: int | None = None) -> int:
        """Bytes of [sequences, length, vocabulary] values, by default in the compute type."""
        tokens = sequences * (length or self.config.data.sequence_length)
        return tokens * self.sizes.vocabulary * (itemsize or self.dtype.itemsize)

    def activation_block(self, sequences: int, length: int | None = None) -> int:
        """Bytes of the largest activations of a layer."""
        work = self.work(sequences, length)
        return work.tokens * max(2 * work.width * work.itemsize, self.sizes.dimensions.hidden_size * FLOAT32)

    def stage(self, name: str, processes: int, *phases: Phase, host: int = 0) -> StageNeeds:
        """The needs of a stage whose workers hold the model; `host`: what they hold beside it when it is on a GPU."""
        gpus = self.config.resources.gpus_per_worker
        return StageNeeds(
            stage=name,
            processes=processes,
            device=self.device,
            devices=self.devices,
            phases=phases,
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
        """One device's share of the overlay."""
        return overlay_part(self.overlay, self.devices)

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
