"""The section of a configuration that only `nexus-ray plan` reads: what a run is planned for."""

from __future__ import annotations

from pydantic import Field

from nexus_ray.config.base import Section


class PlanSection(Section):
    """Hardware and prices that a plan assumes; no other command looks at them."""

    hardware: str | None = Field(
        None,
        description="what to plan for, e.g. h100x16: 16 GPUs in nodes of 8 (h100, h200, a100, a100-80gb, l40s); "
        "default: this machine",
    )
    gpu_memory_gib: float | None = Field(None, gt=0, description="memory of each GPU; default: of the hardware")
    price_per_gpu_hour: float | None = Field(
        None, ge=0, description="money for one GPU for one hour; default: the list price of plan.hardware"
    )
    storage_gbit_per_second: float = Field(
        10.0, gt=0, description="what a node reads from, or writes to, shared storage"
    )
    node_start_seconds: float = Field(300.0, ge=0, description="from asking for a node until Ray runs on it")
