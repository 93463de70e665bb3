"""What Ray gives to each worker of a stage: one section for all stages, and what is different for one of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

from nexus_ray.config.base import Section

ResourceStage = Literal[
    "collect", "select", "convert", "precompute", "train", "evaluate", "export", "pretrain", "serve"
]
_OWN_FIELDS = {"CPU": "cpus_per_worker", "GPU": "gpus_per_worker", "memory": "memory_gib_per_worker"}


def _whole_above_one(gpus: float) -> float:
    if gpus > 1 and not gpus.is_integer():
        raise ValueError("must be a whole number, or a part of one: Ray shares single GPUs only")
    return gpus


class WorkersSection(Section):
    """What Ray gives to each worker."""

    workers: int = Field(2, ge=1, description="workers of a stage")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="a pool over text starts with as many and grows to `workers`; training makes do with as many; "
        "default: all at once",
    )
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores, and torch threads, of a worker")
    gpus_per_worker: Annotated[float, AfterValidator(_whole_above_one)] = Field(
        0, ge=0, description="GPUs of a worker; 0 runs on CPU, a part of one is shared with others"
    )
    memory_gib_per_worker: float | None = Field(None, gt=0, description="memory that Ray reserves for a worker")
    accelerator_type: Annotated[str, StringConstraints(min_length=1)] | None = Field(
        None, description="kind of GPU that a worker's node must have, as Ray names it: A100-80G, H100, L40S"
    )
    custom_per_worker: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="custom resources of a worker, as nodes declare them: {spot: 0.01}"
    )
    placement: Literal["PACK", "SPREAD"] | None = Field(
        None, description="on few nodes, or over many; default: training packs, pools over text and replicas spread"
    )
    use_head: bool = Field(
        False,
        description="let workers run on the cluster's head node too; without it they do so only where there is no "
        "other node and none can come",
    )
    max_wait_minutes: float = Field(
        30, gt=0, description="how long a stage waits for nodes that can hold its workers before it ends"
    )
    max_failures: int = Field(
        2,
        ge=0,
        description="worker crashes in a row, without a new checkpoint between them, that training recovers from by "
        "itself; lost nodes do not count",
    )


class StageWorkers(WorkersSection):
    """What is different for one stage: only the fields that are given count."""

    @model_serializer(mode="wrap")
    def _only_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}


class ResourcesSection(WorkersSection):
    """What Ray gives to each worker of every stage."""

    stages: dict[ResourceStage, StageWorkers] = Field(
        {}, description="what is different for one stage: {train: {workers: 8}, evaluate: {gpus_per_worker: 0}}"
    )

    def of(self, stage: ResourceStage) -> Self:
        """The resources of one stage, with nothing left to be different."""
        given = self.stages.get(stage)
        different = {name: getattr(given, name) for name in given.model_fields_set} if given else {}
        return self.model_copy(update={**different, "stages": {}})

    def without_gpus(self) -> Self:
        """The same for work that no GPU helps."""
        return self.model_copy(update={"gpus_per_worker": 0.0, "accelerator_type": None})

    @model_validator(mode="after")
    def _pools_can_grow(self) -> Self:
        for where, section in self._resolved():
            if section.min_workers is not None and section.min_workers > section.workers:
                raise ValueError(f"{where}min_workers ({section.min_workers}) is more than workers ({section.workers})")
        return self

    @model_validator(mode="after")
    def _custom_resources_are_custom(self) -> Self:
        for where, section in self._resolved():
            for name in section.custom_per_worker:
                if name in _OWN_FIELDS:
                    raise ValueError(f"{where}custom_per_worker.{name} has a field of its own: {_OWN_FIELDS[name]}")
        return self

    def _resolved(self) -> Iterator[tuple[str, Self]]:
        """Every set of resources that some stage gets, with what to say before its fields."""
        yield "", self
        for stage in self.stages:
            yield f"stages.{stage}: ", self.of(stage)
