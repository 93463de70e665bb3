"""What the loop of a training is told: how long, how often, where to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nexus_ray.config import AveragingSection, EarlyStopSection, OptimiserSection, TrackersSection, WarningsSection
from nexus_ray.layout import RunLayout


@dataclass(frozen=True)
class LoopSettings:
    """How long, how often, and where to.

    Attributes:
        steps: optimiser steps of the whole training.
        optimiser: learning rates and clipping.
        validate_every: steps between validations.
        checkpoint_every: steps between recovery checkpoints.
        keep_checkpoints: recovery checkpoints kept.
        layout: where checkpoints, best weights and metrics go.
        averaging: merges with an anchor.
        early_stop: ending before the last step.
        on_nan: what to do with a loss or gradient that is not finite.
        trackers: where metrics go too.
        warnings: from where on to warn.
        roles: of each source, for warnings.
        parameters: the configuration by dotted name, for trackers.
        section: of the configuration that says how to train, for messages.
    """

    steps: int
    optimiser: OptimiserSection
    validate_every: int
    checkpoint_every: int
    keep_checkpoints: int
    layout: RunLayout
    averaging: AveragingSection = field(default_factory=AveragingSection)
    early_stop: EarlyStopSection = field(default_factory=EarlyStopSection)
    on_nan: Literal["stop", "skip"] = "stop"
    trackers: TrackersSection = field(default_factory=TrackersSection)
    warnings: WarningsSection = field(default_factory=WarningsSection)
    roles: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    section: Literal["train", "pretrain"] = "train"
