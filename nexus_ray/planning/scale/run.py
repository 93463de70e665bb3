"""What the scale model needs to know of a run, gathered once: sizes, text, workers, machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

from nexus_ray.config import Config, ResourcesSection
from nexus_ray.planning.allotment import allotted
from nexus_ray.planning.hardware import GPUS, GPUS_PER_NODE, Gpu
from nexus_ray.planning.machine import Machine
from nexus_ray.planning.scale import figures
from nexus_ray.planning.scale.speed import DEFAULT_GPU, Speed, worker_speed
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.text import SourceText
from nexus_ray.planning.worker import Worker

_BITS = 8
_GIGA = 1e9


@dataclass(frozen=True)
class PlannedRun:
    """A run on machines.

    Attributes:
        config: the run.
        worker: its workers' sizes, targets and placement.
        machine: what it runs on.
        text: training text of each trained source; where it is not here, as much as training reads once.
        heldout: tokens that `evaluate` reads, by source.
    """

    config: Config
    worker: Worker
    machine: Machine
    text: Mapping[str, SourceText]
    heldout: Mapping[str, int]

    @property
    def sizes(self) -> ModelSizes:
        """Of the base."""
        return self.worker.sizes

    @property
    def gpu(self) -> Gpu:
        """Kind of the GPUs; the usual one where the machine does not say."""
        return GPUS[self.machine.gpu] if self.machine.gpu else DEFAULT_GPU

    @property
    def on_gpu(self) -> bool:
        """Whether workers compute on GPUs."""
        return self.worker.device == "cuda"

    @property
    def tokens(self) -> int:
        """Of the training text."""
        return sum(source.tokens for source in self.text.values())

    @property
    def text_bytes(self) -> int:
        """Of the training text's files."""
        return sum(source.size for source in self.text.values())

    @property
    def shards(self) -> int:
        """Units of text."""
        return sum(source.shards for source in self.text.values())

    @property
    def nodes(self) -> int:
        """Machines with workers."""
        return self.machine.nodes

    @property
    def storage_rate(self) -> float:
        """Bytes a second between one node and shared storage."""
        return self.config.plan.storage_gbit_per_second * _GIGA / _BITS

    @property
    def is_remote(self) -> bool:
        """Whether it is planned for a cluster: nodes must be started and given the base."""
        return self.config.plan.hardware is not None

    @property
    def load_seconds(self) -> float:
        """From a worker's start until its weights are in place: a CPU maps the files."""
        return self.sizes.stored_bytes / figures.LOAD if self.on_gpu else 0.0

    def resources(self, stage: str) -> ResourcesSection:
        """Of a stage's workers."""
        return allotted(self.config, stage)

    def gpus(self, stage: str, workers: int) -> float:
        """GPUs that so many workers of a stage hold."""
        return workers * self.resources(stage).gpus_per_worker if self.on_gpu else 0.0

    def workers_per_node(self, stage: str) -> int:
        """Workers of a stage that share a node's network, at most."""
        per_node = len(self.machine.gpus) or GPUS_PER_NODE
        fit = int(per_node / (self.resources(stage).gpus_per_worker or 1)) if self.on_gpu else per_node
        return max(1, min(fit, ceil(self.resources(stage).workers / self.nodes)))

    def speed(self, stage: str, sequences: int) -> Speed:
        """Of a worker of a stage whose batches have so many sequences."""
        config = self.config.model_copy(update={"resources": self.resources(stage)})
        kind = self.gpu if self.on_gpu else None
        output = next((source.output for source in self.worker.targets.values() if source.needs_head), None)
        return worker_speed(config, self.sizes, kind, sequences, output if stage == "precompute" else None)


def with_assumed_text(config: Config, text: Mapping[str, SourceText]) -> dict[str, SourceText]:
    """The text of every trained source; of one that is not here, as much as is wanted or as training reads once."""
    return {name: text[name] if name in text else assumed_text(config, name) for name in config.train.sources}


def assumed_text(config: Config, name: str) -> SourceText:
    """Text that a source would have if training read it once, or `targets.max_tokens` of it."""
    read = config.train.steps * config.sequences_per_step()[name] * config.data.sequence_length
    return text_of_tokens(config, config.targets.max_tokens or read)


def text_of_tokens(config: Config, tokens: int) -> SourceText:
    """Files that hold so many tokens of usual text, in shards of `data.shard_bytes`."""
    size = ceil(tokens / figures.TOKENS_PER_BYTE)
    return SourceText(size, max(1, ceil(size / config.data.shard_bytes)), tokens)


def limited(config: Config, text: Mapping[str, SourceText]) -> dict[str, SourceText]:
    """As much of the text as becomes targets: whole shards that hold `targets.max_tokens`."""
    wanted, found = config.targets.max_tokens, {}
    for name, source in text.items():
        tokens = source.up_to(wanted)
        shards = ceil(source.shards * tokens / source.tokens) if source.tokens else source.shards
        found[name] = replace(source, tokens=tokens, shards=max(1, shards))
    return found
