"""How long one worker takes for one batch: forward and backward, on a GPU by arithmetic, memory and launches.

A GPU's time is the larger of two: what its cores and memory need for products and for unpacking experts, and what the
host needs to launch the kernels. Packed experts are computed one after the other, so with few tokens a batch the
launches decide. GPUs of one worker hold different layers and take turns: together they are as fast as one. On a CPU the
parts of a layer were timed on this machine (`teacher_time.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from nexus_ray.config import Config
from nexus_ray.planning import teacher_time
from nexus_ray.planning.hardware import GPUS, Gpu
from nexus_ray.planning.scale import figures
from nexus_ray.planning.scale.flops import TokenFlop, token_flop
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.weights import overlay_width
from nexus_ray.targets.encoding.encodings import OutputEncoding

DEFAULT_GPU = GPUS["h100"]  # where neither the machine nor `plan.hardware` names one
Model = Literal["base", "student"]


@dataclass(frozen=True)
class BatchTime:
    """Seconds of one batch on one worker.

    Attributes:
        products: matrix products.
        memory: unpacking experts, and reading weights.
        launches: what the host needs to launch everything.
    """

    products: float
    memory: float = 0.0
    launches: float = 0.0

    @property
    def seconds(self) -> float:
        """Launches go on while the GPU works."""
        return max(self.products + self.memory, self.launches)

    @property
    def bound(self) -> str:
        """What decides, in a word."""
        if self.launches > self.products + self.memory:
            return "launches"
        return "products" if self.products >= self.memory else "memory"

    def __add__(self, other: BatchTime) -> BatchTime:
        return BatchTime(self.products + other.products, self.memory + other.memory, self.launches + other.launches)

    def __mul__(self, times: float) -> BatchTime:
        return BatchTime(self.products * times, self.memory * times, self.launches * times)


class Speed(Protocol):
    """Of one worker."""

    def forward(self, tokens: int, *, head: int, model: Model = "base") -> BatchTime:
        """A pass of a batch of `tokens`, `head` of them with logits."""
        ...

    def backward(self, tokens: int, *, head: int) -> BatchTime:
        """The gradients of a student's batch."""
        ...


@dataclass(frozen=True)
class GpuSpeed:
    """A worker on GPUs.

    Attributes:
        gpu: their kind.
        sizes: of the base.
        flop: of a token.
        packed: whether experts are unpacked for every batch.
        checkpointed: whether layers run again in the backward pass; packed experts then compute nothing.
        share: of a GPU that the worker has: below 1 where workers share it.
    """

    gpu: Gpu
    sizes: ModelSizes
    flop: TokenFlop
    packed: bool
    checkpointed: bool = False
    share: float = 1.0

    def forward(self, tokens: int, *, head: int, model: Model = "base") -> BatchTime:
        """A pass of a batch of `tokens`, `head` of them with logits."""
        flop = tokens * (self.flop.student if model == "student" else self.flop.base) + head * self.flop.head
        kernels = figures.LAYER_KERNELS_FORWARD, figures.EXPERT_KERNELS_FORWARD
        return self._time(flop, tokens, *kernels)

    def backward(self, tokens: int, *, head: int) -> BatchTime:
        """The gradients of a student's batch."""
        flop = tokens * self.flop.backward + head * self.flop.head
        kernels = figures.LAYER_KERNELS_BACKWARD
        if self.checkpointed:
            again = self.experts_flop if self.packed else 0
            flop += tokens * (self.flop.student - again)
            kernels += figures.LAYER_KERNELS_FORWARD
        return self._time(flop, tokens, kernels, figures.EXPERT_KERNELS_BACKWARD)

    @property
    def experts_flop(self) -> int:
        """Of a token, forward, of all routed experts."""
        dimensions = self.sizes.dimensions
        return 2 * dimensions.layers * dimensions.experts_per_token * self.sizes.expert_parameters()

    def used_experts(self, tokens: int) -> float:
        """Experts of a layer that a batch meets, if tokens choose evenly and independently."""
        dimensions = self.sizes.dimensions
        return dimensions.experts * (1 - (1 - dimensions.experts_per_token / dimensions.experts) ** tokens)

    def _time(self, flop: float, tokens: int, layer_kernels: float, expert_kernels: float) -> BatchTime:
        layers, used = self.sizes.dimensions.layers, self.used_experts(tokens)
        traffic = figures.UNPACK_BYTES if self.packed else 2
        memory = layers * used * self.sizes.expert_parameters() * traffic / self.gpu.bandwidth
        kernels = layers * (layer_kernels + used * expert_kernels)
        products = flop / (self.gpu.flop * figures.UTILISATION)
        return BatchTime(products / self.share, memory / self.share, kernels * figures.LAUNCH)


@dataclass(frozen=True)
class CpuSpeed:
    """A worker on this machine's cores.

    Attributes:
        layers: seconds of a token through the base's layers.
        head: seconds of a token's logits.
        flop: of a token, to scale what was not timed.
    """

    layers: float
    head: float
    flop: TokenFlop

    def forward(self, tokens: int, *, head: int, model: Model = "base") -> BatchTime:
        """A pass of a batch of `tokens`, `head` of them with logits."""
        ratio = self.flop.student / self.flop.base if model == "student" else 1.0
        return BatchTime(tokens * self.layers * ratio + head * self.head)

    def backward(self, tokens: int, *, head: int) -> BatchTime:
        """The gradients of a student's batch."""
        return BatchTime(tokens * self.layers * self.flop.backward / self.flop.base + head * self.head)


def worker_speed(
    config: Config, sizes: ModelSizes, gpu: Gpu | None, sequences: int, output: OutputEncoding | None = None
) -> Speed:
    """The speed of one worker.

    Args:
        config: of the run.
        sizes: of the base.
        gpu: kind of its GPUs; None stands for the usual one.
        sequences: of a batch.
        output: what logits are encoded as, on a CPU timed with them.
    """
    packed = config.model.experts == "packed"
    flop = token_flop(sizes, config.data.sequence_length, overlay_width(sizes, config), packed=packed)
    if config.compute_device == "cuda":
        share = min(1.0, config.resources.gpus_per_worker or 1.0)
        return GpuSpeed(
            gpu or DEFAULT_GPU,
            sizes,
            flop,
            packed and sizes.packed_bytes > 0,
            config.train.gradient_checkpointing,
            share,
        )
    layers, head = teacher_time.seconds_per_token(config, sizes, sequences)
    if output is not None:
        head += teacher_time.encoding_seconds(output, config.resources.cpus_per_worker)
    return CpuSpeed(layers, head, flop)
