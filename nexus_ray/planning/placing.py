"""How many GPUs a worker needs: the fewest over which a stage's layers fit, beside what the configuration gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nexus_ray.config import Config
from nexus_ray.planning.allotment import allotted, with_gpus
from nexus_ray.planning.hardware import GPUS_PER_NODE
from nexus_ray.planning.machine import Machine
from nexus_ray.planning.needs import GIB, StageNeeds
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.stages import stage_needs
from nexus_ray.planning.text import SourceText
from nexus_ray.planning.weights import base_weights
from nexus_ray.planning.worker import dtype_of

Judgement = Literal["fits", "too small", "wasteful", "unknown"]


@dataclass(frozen=True)
class Placement:
    """Where one stage's layers go.

    Attributes:
        stage: its verb.
        configured: GPUs of a worker.
        fewest: that the stage fits on; None where not even a node's do, or where no GPU's memory is known.
        layers: of each configured GPU, the first one with embedding and LM head.
        peaks: bytes that each configured GPU holds at its worst moment.
        weights: bytes of the base on all of them.
        alone: bytes that one GPU would hold.
        memory: bytes of a GPU; None where none is known.
    """

    stage: str
    configured: int
    fewest: int | None
    layers: tuple[tuple[int, ...], ...]
    peaks: tuple[int, ...]
    weights: int
    alone: int
    memory: int | None

    @property
    def judgement(self) -> Judgement:
        """Whether the configured number fits."""
        if self.memory is None:
            return "unknown"
        if max(self.peaks) > self.memory:
            return "too small"
        return "wasteful" if self.fewest is not None and self.fewest < self.configured else "fits"

    @property
    def split(self) -> str:
        """The layers of each GPU, e.g. `0-17 | 18-35`."""
        return " | ".join(_range(layers) for layers in self.layers)

    @property
    def why(self) -> str:
        """The choice and its reason; equal for stages that have the same one."""
        gpus, has = "1 GPU" if self.configured == 1 else f"{self.configured} GPUs", _gib(self.memory or 0)
        line = f"{gpus} a worker, layers {self.split}"
        if self.judgement == "unknown":
            return f"{line}; no GPU to compare with: name it with --hardware, e.g. --hardware h100x8"
        if self.judgement == "too small" and self.fewest is None:
            return f"{line}: too small, and no number of GPUs of {has} in a node is enough"
        if self.judgement == "too small":
            return f"{line}: too small for GPUs of {has}, set resources.gpus_per_worker={self.fewest}"
        if self.judgement == "wasteful":
            return f"{line}: more than needed, {self.fewest} of {has} would do; GPUs of one worker take turns"
        if self.configured == 1:
            return f"{line}, fits one of {has}"
        fewer = "one GPU" if self.configured == 2 else f"{self.configured - 1} GPUs"
        return f"{line}, because {_gib(self.weights)} of weights and what comes with them do not fit {fewer} of {has}"

    def as_dict(self) -> dict[str, Any]:
        """As JSON-serialisable data."""
        return {
            "gpus_per_worker": self.configured,
            "fewest": self.fewest,
            "judgement": self.judgement,
            "layers": [list(layers) for layers in self.layers],
            "peak_bytes": list(self.peaks),
            "one_gpu_bytes": self.alone,
            "gpu_memory_bytes": self.memory,
            "why": self.why,
        }


def placements(
    config: Config, sizes: ModelSizes, text: Mapping[str, SourceText], machine: Machine, needs: Sequence[StageNeeds]
) -> tuple[Placement, ...]:
    """The placement of every stage on GPUs, and the fewest GPUs that each could do with."""
    stages = [each for each in needs if each.device == "cuda"]
    if not stages:
        return ()
    memory = min(machine.gpus) if machine.gpus else None
    most = len(machine.gpus) or GPUS_PER_NODE
    weights = base_weights(sizes, packed=config.model.experts == "packed", dtype=dtype_of(config), device="cuda").own
    peaks = {count: _peaks(with_gpus(config, count), sizes, text) for count in range(1, most + 1)}
    found = []
    for each in stages:
        fitting = [n for n, of in peaks.items() if memory is not None and max(of[each.stage]) <= memory]
        configured = max(1, int(allotted(config, each.stage).gpus_per_worker))
        found.append(
            Placement(
                stage=each.stage,
                configured=configured,
                fewest=min(fitting, default=None),
                layers=each.layers,
                peaks=each.device_peaks,
                weights=weights,
                alone=peaks[1][each.stage][0],
                memory=memory,
            )
        )
    return tuple(found)


def _peaks(config: Config, sizes: ModelSizes, text: Mapping[str, SourceText]) -> dict[str, tuple[int, ...]]:
    return {each.stage: each.device_peaks for each in stage_needs(config, sizes, text)}


def _range(layers: tuple[int, ...]) -> str:
    return f"{layers[0]}-{layers[-1]}" if layers else "none"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
