"""Whether a stage fits a machine, what it lacks, and the first settings that would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, cast

from nexus_ray.config import Config, ResourceStage
from nexus_ray.planning.allotment import replaced
from nexus_ray.planning.machine import Machine
from nexus_ray.planning.needs import GIB, MIB, Phase, StageNeeds
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.stages import stage_needs
from nexus_ray.planning.text import SourceText

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
    """A stage on a machine.

    Attributes:
        needs: what it needs.
        peak: what one device (or the host, on a CPU) of one worker holds at its peak, and when.
        node: anonymous host memory of a node's workers, the driver and Ray, if workers are spread evenly.
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

    def as_dict(self) -> dict[str, Any]:
        """The verdict as JSON-serialisable data; sizes in bytes."""
        needs = self.needs
        return {
            "fits": self.fits,
            "problem": self.problem,
            "change": list(self.change),
            "workers": needs.processes,
            "device": needs.device,
            "devices_per_worker": needs.devices,
            "worker_peak_bytes": self.peak.total,
            "peak_phase": self.peak.name,
            "parts": [asdict(part) for part in self.peak.parts],
            "phases": {each.name: each.total for each in needs.phases},
            "shared_mapped_bytes": needs.mapped,
            "device_peak_bytes": list(needs.device_peaks),
            "host_bytes_per_worker": needs.host,
            "node_bytes": self.node,
        }


def judge(needs: StageNeeds, machine: Machine) -> StageVerdict:
    """Whether a stage fits, when its workers are spread evenly over the nodes."""
    peak = needs.peak
    each = peak.total if needs.device == "cpu" else needs.host
    node = ceil(needs.processes / machine.nodes) * each + (NODE_PROCESSES if needs.stage != "convert" else 0)
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
        if needs.devices > len(machine.gpus) or machine.nodes * (len(machine.gpus) // needs.devices) < ceil(
            needs.processes / needs.sharing
        ):
            size = f"{each / GIB:.1f} GiB"
            return f"takes GPUs with {size} each, {wanted} in all; {machine.name} has {machine.total_gpus}"
        if each > min(machine.gpus):
            return f"takes {each / GIB:.1f} GiB of each GPU, they have {min(machine.gpus) / GIB:.1f} GiB"
    usable = int(machine.memory * _USABLE)
    if node > usable:
        return f"takes {node / GIB:.1f} GiB of memory, usable are {usable / GIB:.1f} GiB"
    return ""


def with_change(
    verdict: StageVerdict, config: Config, sizes: ModelSizes, text: Mapping[str, SourceText], machine: Machine
) -> StageVerdict:
    """The verdict with the first settings that would make its stage fit."""
    if verdict.fits:
        return verdict
    stage, changes = cast(ResourceStage, verdict.needs.stage), dict[str, Any]()
    seen = config.for_stage(stage)

    def fits(settings: dict[str, Any]) -> bool:
        needs = {each.stage: each for each in stage_needs(replaced(seen, settings), sizes, text)}
        return stage not in needs or judge(needs[stage], machine).fits

    for field, value in _candidates(seen, stage, verdict.needs):
        changes[field] = value
        if fits(changes):
            break
    else:
        return verdict
    for field in list(changes):  # those that another one makes needless
        fewer = {name: value for name, value in changes.items() if name != field}
        if fits(fewer):
            changes = fewer
    named = {_named(name, config, stage): value for name, value in changes.items()}
    return replace(verdict, change=tuple(f"{name}={_as_yaml(value)}" for name, value in named.items()))


def _named(name: str, config: Config, stage: ResourceStage) -> str:
    """The setting that decides `name` for a stage: its own, where it has one."""
    section, field = name.split(".")
    given = config.resources.stages.get(stage)
    is_own = section == "resources" and given is not None and field in given.model_fields_set
    return f"resources.stages.{stage}.{field}" if is_own else name


def _candidates(config: Config, stage: str, needs: StageNeeds) -> Iterator[tuple[str, Any]]:
    """Changes that make a stage smaller, cheapest first; each is tried on top of those before."""
    if config.model.experts != "packed":
        yield "model.experts", "packed"
    if stage in _BATCH_FIELDS:
        section, field = _BATCH_FIELDS[stage]
        for batch in _halves(getattr(getattr(config, section), field), 1):
            yield f"{section}.{field}", batch
    if stage == "train" and not config.train.gradient_checkpointing:
        yield "train.gradient_checkpointing", True
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


def _as_yaml(value: object) -> str:
    """As it is written on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value
