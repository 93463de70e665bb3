"""The runs of docs/scaling.md: the example configurations with other amounts of text, numbers of GPUs and batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

from nexus_ray.config import Config, load_config
from nexus_ray.planning.allotment import replaced
from nexus_ray.planning.hardware import parse_hardware
from nexus_ray.planning.machine import cluster_machine
from nexus_ray.planning.placing import placements
from nexus_ray.planning.published import CONFIGURATIONS, gpt_oss_specs
from nexus_ray.planning.scale.costs import RunCost
from nexus_ray.planning.scale.model import planned_run, run_cost
from nexus_ray.planning.scale.run import PlannedRun, with_assumed_text
from nexus_ray.planning.sizes import ModelSizes, sizes_of
from nexus_ray.planning.stages import stage_needs

MODELS = ("gpt-oss-20b", "gpt-oss-120b")
TOKENS = tuple(10**power for power in range(6, 11))
GPUS = (1, 8, 64, 512)
GPU = "h100"
# Settings for many GPUs: half a million tokens a step, and batches large enough for experts that take turns.
CLUSTER_SETTINGS: Mapping[str, Any] = {
    "train.micro_batch_sequences": 8,
    "train.gradient_checkpointing": True,
    "targets.batch_sequences": 32,
    "collect.batch_sequences": 32,
    "collect.unit_batches": 1,
    "evaluate.batch_sequences": 32,
}
CLUSTER_SEQUENCES = 512


@dataclass(frozen=True)
class Scenario:
    """One run on paper.

    Attributes:
        model: name of the example configuration.
        tokens: that training reads, once, half of them with a teacher.
        gpus: of the cluster.
        sequences: of a step; None: as the example configuration has it.
        settings: replaced in the configuration.
    """

    model: str
    tokens: int
    gpus: int
    sequences: int | None = CLUSTER_SEQUENCES
    settings: tuple[tuple[str, Any], ...] = tuple(CLUSTER_SETTINGS.items())

    def config(self, configs: Path) -> Config:
        """The configuration of the run, from the example in the directory `configs`."""
        config = load_config(configs / f"{self.model}.yaml")
        a_worker = min(int(config.resources.gpus_per_worker), self.gpus)
        changes = dict(self.settings) | {
            "resources.gpus_per_worker": a_worker,
            "resources.workers": self.gpus // a_worker,
            "plan.hardware": f"{GPU}x{self.gpus}",
        }
        config = replaced(config, changes)
        if self.sequences is not None:
            config = with_sequences(config, self.sequences)
        a_step = sum(config.sequences_per_step().values()) * config.data.sequence_length
        return replaced(config, {"train.steps": ceil(self.tokens / a_step)})


def with_sequences(config: Config, sequences: int) -> Config:
    """The configuration with so many sequences a step, an equal part of each source."""
    values = config.model_dump()
    for section in values["train"]["sources"].values():
        section |= {"sequences_per_step": sequences // len(values["train"]["sources"]), "tokens_per_step": None}
    return Config.model_validate(values)


@cache
def published_sizes(model: str) -> ModelSizes:
    """Sizes of a published model."""
    config = CONFIGURATIONS[model]
    return sizes_of(config, gpt_oss_specs(config), path=Path(model), origin="the published configuration")


def planned(scenario: Scenario, configs: Path) -> PlannedRun:
    """What the scale model works with."""
    config = scenario.config(configs)
    machine = cluster_machine(parse_hardware(config.plan.hardware or GPU))
    return planned_run(config, published_sizes(scenario.model), {}, machine)


@dataclass(frozen=True)
class Outcome:
    """What a run on paper takes.

    Attributes:
        cost: of all stages.
        too_small: stages for which a worker's GPUs are too small.
    """

    cost: RunCost
    too_small: frozenset[str]


def outcome(scenario: Scenario, configs: Path) -> Outcome:
    """Cost of a run, and what of it does not fit."""
    config, sizes = scenario.config(configs), published_sizes(scenario.model)
    machine = cluster_machine(parse_hardware(config.plan.hardware or GPU))
    text = with_assumed_text(config, {})
    found = placements(config, sizes, text, machine, stage_needs(config, sizes, text))
    too_small = frozenset(each.stage for each in found if each.judgement == "too small")
    return Outcome(run_cost(config, sizes, {}, machine), too_small)
