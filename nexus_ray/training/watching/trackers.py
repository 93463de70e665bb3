"""The trackers: TensorBoard files beside the run always, MLflow and Weights & Biases where they are configured.

A resumed training continues the MLflow and W&B run that it had: their names stand in the run directory. Steps that it
takes again are written again: TensorBoard hides the first time, MLflow and W&B keep both, which are equal.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

from nexus_ray.config import TrackersSection
from nexus_ray.config.training import MlflowSection, WandbSection
from nexus_ray.errors import ArtefactError, ConfigError
from nexus_ray.layout import RunLayout
from nexus_ray.storage import digest, read_json, write_json
from nexus_ray.training.local import local_only
from nexus_ray.training.watching.background import Background

_FLUSH_SECONDS = 10
_MLFLOW_METRICS, _MLFLOW_PARAMETERS, _MLFLOW_LENGTH = 1000, 100, 500  # of one request, by MLflow's limits
_WANDB_STEP = "global_step"
_remembering = threading.Lock()

Parameters = Mapping[str, Any]


def check_trackers(section: TrackersSection) -> None:
    """Refuse trackers whose package is missing, before any worker starts.

    Raises:
        ConfigError: it names the package and how to install it.
    """
    for name in ("mlflow", "wandb"):
        if getattr(section, name) is not None and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.trackers.{name} is set, but the package {name} is not installed",
                f"pip install 'nexus-ray[{name}]', or leave train.trackers.{name} out",
            )


def start_trackers(
    section: TrackersSection, layout: RunLayout, first_step: int, parameters: Parameters
) -> list[Background]:
    """TensorBoard and the configured trackers, each in its own thread."""
    trackers = [Background("TensorBoard", partial(TensorBoard, layout, first_step))]
    if section.mlflow:
        trackers.append(Background("MLflow", partial(Mlflow, section.mlflow, layout, parameters)))
    if section.wandb:
        trackers.append(Background("W&B", partial(Wandb, section.wandb, layout, parameters)))
    return trackers


class TensorBoard:
    """TensorBoard event files in the run directory.

    Args:
        layout: of the run.
        first_step: what earlier files say of this step and later ones is hidden; 0 removes them.
    """

    def __init__(self, layout: RunLayout, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        if not first_step:
            shutil.rmtree(local_only(layout.tensorboard), ignore_errors=True)
        self._writer = SummaryWriter(
            str(layout.tensorboard),
            purge_step=first_step,
            flush_secs=_FLUSH_SECONDS,
            filename_suffix=f".{uuid.uuid4().hex[:8]}",  # its names have whole seconds: a quick restart would overwrite
        )

    def write(self, event: str, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Numbers as scalars, texts as texts."""
        for tag, value in numbers.items():
            self._writer.add_scalar(tag, value, step)
        for tag, text in texts.items():
            self._writer.add_text(tag, text, step)
        if event == "checkpoint":
            self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Write what is left."""
        self._writer.close()


class Mlflow:
    """An MLflow run.

    Args:
        section: where to.
        layout: of the run, whose directory names the MLflow run.
        parameters: the configuration, by dotted name.
    """

    def __init__(self, section: MlflowSection, layout: RunLayout, parameters: Parameters) -> None:
        self._entities = importlib.import_module("mlflow.entities")
        self._client = importlib.import_module("mlflow").MlflowClient(tracking_uri=section.tracking_uri)
        place = digest([self._client.tracking_uri, section.experiment])  # an address may hold a password
        known = _known(layout, "mlflow", place)
        self._run = known or self._create(section.experiment, layout)
        if known:
            self._client.update_run(known, status="RUNNING")
            return
        _remember(layout, "mlflow", place, self._run)
        values = [self._entities.Param(key, str(value)[:_MLFLOW_LENGTH]) for key, value in parameters.items()]
        for start in range(0, len(values), _MLFLOW_PARAMETERS):
            self._client.log_batch(self._run, params=values[start : start + _MLFLOW_PARAMETERS])

    def _create(self, experiment: str, layout: RunLayout) -> str:
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        return str(self._client.create_run(number, run_name=layout.directory.name).info.run_id)

    def write(self, event: str, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Numbers as metrics; texts are left out."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(tag, value, now, step) for tag, value in numbers.items()]
        for start in range(0, len(metrics), _MLFLOW_METRICS):
            self._client.log_batch(self._run, metrics=metrics[start : start + _MLFLOW_METRICS])

    def close(self, *, failed: bool) -> None:
        """Say how it ended."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class Wandb:
    """A Weights & Biases run. Its horizontal axis is `global_step`, so that steps may be taken again.

    Args:
        section: where to.
        layout: of the run, whose directory names the W&B run and holds its files.
        parameters: the configuration, by dotted name.
    """

    def __init__(self, section: WandbSection, layout: RunLayout, parameters: Parameters) -> None:
        wandb = importlib.import_module("wandb")
        place = digest([section.entity, section.project])
        name = _known(layout, "wandb", place) or uuid.uuid4().hex[:8]
        _remember(layout, "wandb", place, name)
        self._run = wandb.init(
            project=section.project,
            entity=section.entity,
            mode=section.mode,
            id=name,
            name=layout.directory.name,
            resume="allow",
            dir=str(layout.directory),
            config=dict(parameters),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric=_WANDB_STEP)

    def write(self, event: str, step: int, numbers: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Numbers and texts of one step."""
        self._run.log({**numbers, **texts, _WANDB_STEP: step})

    def close(self, *, failed: bool) -> None:
        """Say how it ended, and wait until everything is sent."""
        self._run.finish(exit_code=int(failed))


def _names(layout: RunLayout) -> dict[str, Any]:
    try:
        names: dict[str, Any] = read_json(layout.trackers, what="names of trackers", hint="")
    except ArtefactError:
        return {}
    return names


def _known(layout: RunLayout, tracker: str, place: str) -> str | None:
    """What a tracker knows this training by, if it has been there before."""
    found = _names(layout).get(tracker, {})
    return str(found["run"]) if found.get("place") == place else None


def _remember(layout: RunLayout, tracker: str, place: str, run: str) -> None:
    with _remembering:
        write_json(layout.trackers, _names(layout) | {tracker: {"place": place, "run": run}})
