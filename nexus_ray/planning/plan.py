"""The plan of a run: what every stage needs beside what this machine has, a verdict, and what to change.

It reads `config.json`, file headers, file sizes and a small sample of the text, and times a few matrix products; no
weights, no model, no Ray.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nexus_ray.config import Config
from nexus_ray.planning.base_cache import BaseCache, plan_base_cache
from nexus_ray.planning.machine import Machine, this_machine
from nexus_ray.planning.needs import Part
from nexus_ray.planning.schedules import Schedules, make_schedules
from nexus_ray.planning.sizes import ModelSizes, read_sizes
from nexus_ray.planning.stages import stage_needs
from nexus_ray.planning.storage import storage_parts
from nexus_ray.planning.target_sizes import SourceTargets
from nexus_ray.planning.teacher_time import PassTime, pass_times
from nexus_ray.planning.text import measure_text
from nexus_ray.planning.verdicts import StageVerdict, judge, with_change
from nexus_ray.planning.worker import Worker


@dataclass(frozen=True)
class SourceTokens:
    """Tokens of one trained source.

    Attributes:
        available: estimate of its training text, as far as `targets.max_tokens` wants it; None when its files are
            missing.
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
    targets: dict[str, SourceTargets]
    tokens: dict[str, SourceTokens]
    times: tuple[PassTime, ...]
    base_cache: BaseCache | None
    schedules: Schedules

    @property
    def storage_bytes(self) -> int:
        """Disk of all artefacts."""
        return sum(part.size for part in self.storage)

    @property
    def storage_fits(self) -> bool:
        """Whether the disk takes them; an object store does."""
        return self.machine.free_disk is None or self.storage_bytes <= self.machine.free_disk

    @property
    def fits(self) -> bool:
        """Whether the whole run does."""
        cached = self.base_cache is None or self.base_cache.fits
        return cached and self.storage_fits and all(stage.fits for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-serialisable data; sizes in bytes."""
        return {
            "fits": self.fits,
            "parameters": self.sizes.parameters,
            "checkpoint_bytes": self.sizes.stored_bytes,
            "machine": asdict(self.machine),
            "stages": {stage.needs.stage: stage.as_dict() for stage in self.stages},
            "storage": {part.name: part.size for part in self.storage} | {"total": self.storage_bytes},
            "base_cache": None if self.base_cache is None else asdict(self.base_cache),
            "targets": {name: _targets_as_dict(value) for name, value in self.targets.items()},
            "tokens": {name: asdict(value) | {"epochs": value.epochs} for name, value in self.tokens.items()},
            "base_passes": {each.stage: asdict(each) for each in self.times},
            "schedules": self.schedules.as_dict(),
        }


def make_plan(config: Config, machine: Machine | None = None) -> Plan:
    """Plan a run for a machine, by default this one.

    Raises:
        ModelError: the base model is missing, damaged or of an unsupported family.
        ConfigError: the settings of targets do not fit the model.
    """
    machine = machine or this_machine(config.run.directory)
    sizes = read_sizes(config.model.path)
    text = measure_text(config)
    worker = Worker.of(config, sizes, text)
    needs = stage_needs(config, sizes, text)
    stages = tuple(with_change(judge(stage, machine), config, sizes, text, machine) for stage in needs)
    return Plan(
        sizes=sizes,
        machine=machine,
        stages=stages,
        storage=storage_parts(config, sizes, worker.overlay, worker.targets),
        targets=worker.targets,
        tokens={name: _tokens(config, name, source, known=name in text) for name, source in worker.targets.items()},
        base_cache=plan_base_cache(config.model.path),
        times=pass_times(config, sizes, worker.targets),
        schedules=make_schedules(config),
    )


def _tokens(config: Config, name: str, source: SourceTargets, *, known: bool) -> SourceTokens:
    sequences = config.train.steps * config.sequences_per_step()[name]
    return SourceTokens(source.tokens if known else None, sequences * config.data.sequence_length)


def _targets_as_dict(source: SourceTargets) -> dict[str, Any]:
    return {
        "form": source.form,
        "tokens": source.tokens,
        "teacher_tokens": source.teacher_tokens,
        "bytes_per_token": source.bytes_per_token,
        "bytes": source.stored_bytes,
    }
