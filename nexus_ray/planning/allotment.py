"""What each stage is given: the one place of planning that reads `resources` for a stage."""

from __future__ import annotations

from typing import Any, cast

from nexus_ray.config import Config, ResourcesSection, ResourceStage


def allotted(config: Config, stage: str) -> ResourcesSection:
    """The resources of a stage's workers; `serve` has replicas instead of workers."""
    resources = config.resources.of(cast(ResourceStage, stage))
    if stage == "serve":
        return resources.model_copy(update={"workers": config.serve.replicas})
    return resources


def with_gpus(config: Config, gpus: int) -> Config:
    """The configuration with another number of GPUs a worker."""
    return replaced(config, {"resources.gpus_per_worker": gpus})


def replaced(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration with other values of `section.field`."""
    values = config.model_dump()
    for name, value in changes.items():
        section, field = name.split(".")
        values[section][field] = value
    return Config.model_validate(values)
