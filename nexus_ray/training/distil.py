"""The train stage: from the initial overlay and the targets to the trained overlay."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from nexus_ray.checkpoints.overlay import OverlayConfig, add_routers, load_overlay, load_overlay_config, save_overlay
from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.config import Config, flatten
from nexus_ray.errors import ArtefactError
from nexus_ray.families import family_of
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.trained import is_trained
from nexus_ray.targets.reading.reader import TargetSet
from nexus_ray.training import trainer
from nexus_ray.training.checkpointing import load_checkpoint
from nexus_ray.training.local import local_only
from nexus_ray.training.loop import run_steps
from nexus_ray.training.readiness import check_targets, report_epochs
from nexus_ray.training.settings import LoopSettings
from nexus_ray.training.task import DistilTask

logger = logging.getLogger(__name__)


def check_training(config: Config, layout: RunLayout) -> None:
    """Refuse what cannot be trained, before anything that an earlier training left is touched.

    Raises:
        ArtefactError: the initial overlay or the targets are missing or do not fit.
        ConfigError: fewer sequences in a step than workers.
        DataError: a source has too few sequences.
    """
    description = load_overlay_config(layout.initial_overlay)
    check_targets(TargetSet.open(layout.targets).manifest, config, description)


def train(config: Config, layout: RunLayout) -> OverlayConfig:
    """Train the initial overlay of a run, which `check_training` lets pass, and write the best weights as its overlay.

    Raises:
        NexusError: training failed.
    """
    report_epochs(TargetSet.open(layout.targets).manifest, config)
    arguments = {"config": config.model_dump(mode="json")}
    trainer.run_distributed(
        _loop,
        arguments,
        local_only(layout.training),
        config.resources,
        metrics=local_only(layout.metrics),
        steps=config.train.steps,
    )
    return _write_best(config, layout)


def _loop(arguments: dict[str, Any]) -> None:
    """Ray Train's per-worker function."""
    config = Config.model_validate(arguments["config"])
    layout, train = RunLayout(config.run.directory), config.train
    settings = LoopSettings(
        steps=train.steps,
        optimiser=train.optimiser,
        validate_every=train.validate_every,
        checkpoint_every=train.checkpoint_every,
        keep_checkpoints=train.keep_checkpoints,
        layout=layout,
        averaging=train.averaging,
        early_stop=train.early_stop,
        on_nan=train.on_nan,
        trackers=train.trackers,
        warnings=train.warnings,
        roles=config.roles(),
        parameters=flatten(config),
    )
    task = DistilTask(config, layout)
    try:
        run_steps(task, settings)
    finally:
        task.close()


def _write_best(config: Config, layout: RunLayout) -> OverlayConfig:
    """Turn the best checkpoint into the run's overlay.

    Raises:
        ArtefactError: there is none.
    """
    initial = load_overlay_config(layout.initial_overlay)
    model, routers = read_model_config(config.model.path), config.train.routers.train
    _, tensors = load_overlay(layout.initial_overlay, initial.base_fingerprint)
    description, tensors = add_routers(initial, tensors, routers, family_of(model).dimensions(model).experts)
    trained = {
        name: nn.Parameter(tensor.float())
        for name, tensor in tensors.items()
        if is_trained(name, learn_scale=initial.learn_scale, routers=routers)
    }
    if not layout.best.exists():
        raise ArtefactError(
            f"there are no best weights in {layout.best}: no validation had a finite loss",
            "look for `warning` and `validation` in metrics.jsonl, and lower train.optimiser.learning_rate",
        )
    state = load_checkpoint(local_only(layout.best), trained)
    description = description.model_copy(update={"trained_steps": state["step"]})
    save_overlay(layout.overlay, description, {**tensors, **{name: p.detach() for name, p in trained.items()}})
    logger.info("overlay written: the weights after step %d of %d", state["step"], config.train.steps)
    return description
