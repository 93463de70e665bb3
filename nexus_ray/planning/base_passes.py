"""Passes of the frozen base over text, in `collect` and `precompute`: tokens, operations and time without overhead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nexus_ray.config import Config
from nexus_ray.planning.allotment import allotted
from nexus_ray.planning.hardware import Gpu
from nexus_ray.planning.scale.speed import worker_speed
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.target_sizes import SourceTargets
from nexus_ray.planning.teacher_time import flop_per_token, head_flop
from nexus_ray.targets.encoding.encodings import OutputEncoding


@dataclass(frozen=True)
class PassTime:
    """The base's passes in one stage.

    Attributes:
        stage: its verb.
        tokens: that the base reads.
        flop: floating-point operations of all of them, two for a multiplication with its addition.
        seconds: expected of all workers side by side, without starting them and without anything but batches.
        measured: whether the parts of a layer were timed on this machine; else the speed is that of a model.
        bound: what decides the time of a batch on a GPU: products, memory or launches.
    """

    stage: str
    tokens: int
    flop: float
    seconds: float
    measured: bool
    bound: str = ""


def pass_times(
    config: Config, sizes: ModelSizes, targets: Mapping[str, SourceTargets], gpu: Gpu | None = None
) -> tuple[PassTime, ...]:
    """Router statistics and teacher targets; stages without a pass are left out."""
    tokens = sum(part.teacher_tokens for part in targets.values())
    headed = sum(part.teacher_tokens for part in targets.values() if part.needs_head)
    output = next((part.output for part in targets.values() if part.needs_head), None)
    found = [_pass_time("collect", config.collect.tokens, 0, config.collect.batch_sequences, None, config, sizes, gpu)]
    if tokens:
        batch = config.targets.batch_sequences
        found.append(_pass_time("precompute", tokens, headed, batch, output, config, sizes, gpu))
    return tuple(found)


def _pass_time(
    stage: str,
    tokens: int,
    headed: int,
    sequences: int,
    output: OutputEncoding | None,
    config: Config,
    sizes: ModelSizes,
    gpu: Gpu | None,
) -> PassTime:
    """`headed`: of the tokens, those whose logits are formed and encoded as `output`."""
    length, resources = config.data.sequence_length, allotted(config, stage)
    given = config.model_copy(update={"resources": resources})
    flop = tokens * flop_per_token(sizes, length, head=False) + headed * head_flop(sizes)
    batch = sequences * length
    time = worker_speed(given, sizes, gpu, sequences, output).forward(batch, head=round(batch * headed / tokens))
    seconds = tokens / batch * time.seconds / resources.workers
    measured = config.compute_device == "cpu"
    return PassTime(stage, tokens, flop, seconds, measured, "" if measured else time.bound)
