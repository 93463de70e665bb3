"""The plan of a run: what every stage needs beside what this machine has, a verdict, and what to change.

It reads `config.json`, file headers, file sizes and a small sample of the text; no weights, no model, no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from nexus_ray.config import Config
from nexus_ray.planning.machine import Machine, this_machine
from nexus_ray.planning.needs import GIB, MIB, Part, Phase, StageNeeds
from nexus_ray.planning.sizes import ModelSizes, read_sizes
from nexus_ray.planning.stages import stage_needs
from nexus_ray.planning.storage import storage_parts
from nexus_ray.planning.text import SourceText, measure_text
from nexus_ray.planning.worker import Worker

# Anonymous memory of the driver, Ray's controllers and daemons, measured beside the demo's workers.
NODE_PROCESSES = 1000 * MIB
_USABLE = 0.95  # of a node's memory: above it Ray kills workers (RAY_memory_usage_threshold)
_SHORTEST_SEQUENCE = 128
_BATCH_FIELDS = {
    "collect": ("collect", "batch_sequences"),
    "precompute": ("targets", "batch_sequences"),
    "train": ("train", "micro_batch_sequences"),
    "evaluate": ("evaluate", "batch_sequences"),
    "serve": ("evaluate", "batch_sequences"),
}


@dataclass(frozen=True)
class StageVerdict:
    """A stage on this machine.

    Attributes:
        needs: what it needs.
        peak: what one device (or the host, on a CPU) of one worker holds at its peak, and when.
        node: anonymous host memory of all its workers, the driver and Ray, if they are all on this machine.
        fits: whether it does.
        problem: what is missing, or what will be slow; empty when nothing is.
        change: settings that would make it fit, as overrides; empty when it fits or none was found.
    """

    needs: StageNeeds
    peak: Phase
    node: int
    fits: bool
    problem: str = ""
    change: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceTokens:
    """Tokens of one trained source.

    Attributes:
        available: estimate of its training text; None when its files are missing.
        trained: tokens that training reads.
    """

    available: int | None
    trained: int

    @property
    def epochs(self) -> float | None:
        """How often training reads the text."""
        return self.trained / self.available if self.available else None


@dataclass(frozen=True)
class Plan:
    """Everything `nexus-ray plan` says."""

    sizes: ModelSizes
    machine: Machine
    stages: tuple[StageVerdict, ...]
    storage: tuple[Part, ...]
    tokens: dict[str, SourceTokens]

    @property
    def storage_bytes(self) -> int:
        """Disk of all artefacts."""
        return sum(part.size for part in self.storage)

    @property
    def storage_fits(self) -> bool:
        """Whether the disk takes them."""
        return self.storage_bytes <= self.machine.free_disk

    @property
    def fits(self) -> bool:
        """Whether the whole run does."""
        return self.storage_fits and all(stage.fits for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-serialisable data; sizes in bytes."""
        return {
            "fits": self.fits,
            "parameters": self.sizes.parameters,
            "checkpoint_bytes": self.sizes.stored_bytes,
            "machine": asdict(self.machine),
            "stages": {stage.needs.stage: _stage_as_dict(stage) for stage in self.stages},
            "storage": {part.name: part.size for part in self.storage} | {"total": self.storage_bytes},
            "tokens": {name: asdict(value) | {"epochs": value.epochs} for name, value in self.tokens.items()},
        }


def make_plan(config: Config, machine: Machine | None = None) -> Plan:
    """Plan a run for a machine, by default this one.

    Raises:
        ModelError: the base model is missing, damaged or of an unsupported family.
    """
    machine = machine or this_machine(config.run.directory)
    sizes = read_sizes(config.model.path)
    text = measure_text(config)
    worker = Worker.of(config, sizes)
    needs = stage_needs(config, sizes, text)
    stages = tuple(_with_change(judge(stage, machine), config, sizes, text, machine) for stage in needs)
    storage = storage_parts(config, sizes, worker.overlay, text)
    return Plan(sizes, machine, stages, storage, _tokens(config, text))


def judge(needs: StageNeeds, machine: Machine) -> StageVerdict:
    """Whether a stage fits, when all its workers are on this machine."""
    peak = needs.peak
    each = peak.total if needs.device == "cpu" else needs.host
    node = needs.processes * each + (NODE_PROCESSES if needs.stage != "convert" else 0)
    missing = _missing(needs, peak, node, machine)
    if missing:
        return StageVerdict(needs, peak, node, False, missing)
    return StageVerdict(needs, peak, node, True, _caution(needs, node, machine))


def _caution(needs: StageNeeds, node: int, machine: Machine) -> str:
    """What will go badly although it fits; empty when nothing."""
    if machine.available is not None and node > machine.available:
        return f"fits, but only {machine.available / GIB:.1f} GiB of memory are free at the moment"
    if needs.mapped and node + needs.mapped > machine.memory:
        return "fits, but the base does not stay in memory and is read from disk again and again"
    return ""


def _missing(needs: StageNeeds, peak: Phase, node: int, machine: Machine) -> str:
    """What the machine lacks; empty when nothing."""
    if needs.device == "cuda":
        wanted = ceil(needs.processes / needs.sharing) * needs.devices
        each = peak.total * min(needs.sharing, needs.processes)
        if len(machine.gpus) < wanted:
            size = f"{each / GIB:.1f} GiB"
            return f"takes GPUs with {size} each, {wanted} in all; this machine has {len(machine.gpus)}"
        if each > min(machine.gpus):
            return f"takes {each / GIB:.1f} GiB of each GPU, they have {min(machine.gpus) / GIB:.1f} GiB"
    usable = int(machine.memory * _USABLE)
    if node > usable:
        return f"takes {node / GIB:.1f} GiB of memory, usable are {usable / GIB:.1f} GiB"
    return ""


def _with_change(
    verdict: StageVerdict, config: Config, sizes: ModelSizes, text: dict[str, SourceText], machine: Machine
) -> StageVerdict:
    """The verdict with the first settings that would make its stage fit."""
    if verdict.fits:
        return verdict
    stage, changes = verdict.needs.stage, dict[str, Any]()

    def fits(settings: dict[str, Any]) -> bool:
        needs = {each.stage: each for each in stage_needs(_replace(config, settings), sizes, text)}
        return stage not in needs or judge(needs[stage], machine).fits

    for field, value in _candidates(config, stage, verdict.needs):
        changes[field] = value
        if fits(changes):
            break
    else:
        return verdict
    for field in list(changes):  # those that another one makes needless
        fewer = {name: value for name, value in changes.items() if name != field}
        if fits(fewer):
            changes = fewer
    return replace(verdict, change=tuple(f"{name}={value}" for name, value in changes.items()))


def _candidates(config: Config, stage: str, needs: StageNeeds) -> Iterator[tuple[str, Any]]:
    """Changes that make a stage smaller, cheapest first; each is tried on top of those before."""
    if config.model.experts != "packed":
        yield "model.experts", "packed"
    if stage in _BATCH_FIELDS:
        section, field = _BATCH_FIELDS[stage]
        for batch in _halves(getattr(getattr(config, section), field), 1):
            yield f"{section}.{field}", batch
    if config.model.dtype == "float32" or (config.model.dtype == "auto" and needs.device == "cpu"):
        yield "model.dtype", "bfloat16"
    if stage == "serve":
        yield "serve.replicas", 1
    elif config.resources.workers > 1:
        yield "resources.workers", 1
    if needs.device == "cuda":
        for gpus in (2, 4, 8):
            if gpus > config.resources.gpus_per_worker:
                yield "resources.gpus_per_worker", gpus
    for length in _halves(config.data.sequence_length, _SHORTEST_SEQUENCE):
        yield "data.sequence_length", length


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value


def _replace(config: Config, changes: dict[str, Any]) -> Config:
    values = config.model_dump()
    for name, value in changes.items():
        section, field = name.split(".")
        values[section][field] = value
    return Config.model_validate(values)


def _tokens(config: Config, text: dict[str, SourceText]) -> dict[str, SourceTokens]:
    per_sequence = config.train.steps * config.data.sequence_length
    return {
        name: SourceTokens(text[name].tokens if name in text else None, section.sequences_per_step * per_sequence)
        for name, section in config.train.sources.items()
    }


def _stage_as_dict(stage: StageVerdict) -> dict[str, Any]:
    needs = stage.needs
    return {
        "fits": stage.fits,
        "problem": stage.problem,
        "change": list(stage.change),
        "workers": needs.processes,
        "device": needs.device,
        "devices_per_worker": needs.devices,
        "worker_peak_bytes": stage.peak.total,
        "peak_phase": stage.peak.name,
        "parts": [asdict(part) for part in stage.peak.parts],
        "phases": {each.name: each.total for each in needs.phases},
        "shared_mapped_bytes": needs.mapped,
        "host_bytes_per_worker": needs.host,
        "node_bytes": stage.node,
    }
