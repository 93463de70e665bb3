"""Running a training loop on Ray Train: workers, recovery checkpoints, failures.

Ray Train stores the checkpoints that a loop reports, keeps the newest few, hands the last one to restarted
workers, and finds it again when the same run directory is trained after the driver died.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from nexus_ray.cluster import actor_options, ensure_ray
from nexus_ray.config import ResourcesSection
from nexus_ray.errors import NexusError, error_from_record, error_to_record
from nexus_ray.storage import make_directory, read_json, write_json
from nexus_ray.training.checkpointing import load_checkpoint, save_checkpoint
from nexus_ray.training.follow import following

logger = logging.getLogger(__name__)


def run_distributed(
    loop: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    directory: Path,
    resources: ResourcesSection,
    keep_checkpoints: int,
    metrics: Path,
    steps: int,
) -> None:
    """Run `loop(arguments)` on `resources.workers` Ray Train workers.

    Args:
        loop: training function; it calls `restore` and `checkpoint` of this module.
        arguments: its single argument.
        directory: where Ray Train keeps its state; the same directory resumes.
        resources: what each worker gets.
        keep_checkpoints: recovery checkpoints kept.
        metrics: the file that the loop writes its metrics to; progress is read from it.
        steps: optimiser steps of the whole training.

    Raises:
        NexusError: the loop failed; carries the worker's message.
    """
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of the configuration must keep working
    ensure_ray()
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    error_file = make_directory(directory) / "error.json"
    trainer = TorchTrainer(
        _guarded(loop, error_file),
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=_requests(resources),
        ),
        run_config=RunConfig(
            name=directory.name,
            storage_path=str(directory.parent.resolve()),
            failure_config=FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=keep_checkpoints),
        ),
    )
    error_file.unlink(missing_ok=True)
    try:
        with following(metrics, steps, "train"):
            trainer.fit()
    except SystemExit as error:  # how Ray Train answers Ctrl-C, after stopping its workers
        raise KeyboardInterrupt from error
    except Exception as error:
        if error_file.exists():
            raise error_from_record(read_json(error_file, what="error record", hint="run again")) from error
        raise NexusError(
            f"training failed: {error}", "run the same command again: it continues from the last checkpoint"
        ) from error


def _guarded(loop: Callable[[dict[str, Any]], None], error_file: Path) -> Callable[[dict[str, Any]], None]:
    """`loop`, leaving an error that a user can cause where the driver finds it, and not trying again after one."""

    def run(arguments: dict[str, Any]) -> None:
        if error_file.exists():
            raise error_from_record(read_json(error_file, what="error record", hint="run again"))
        try:
            loop(arguments)
        except NexusError as error:
            write_json(error_file, error_to_record(error))
            raise

    return run


def _requests(resources: ResourcesSection) -> dict[str, float]:
    """What Ray Train calls the resources of `actor_options`."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    return {names.get(key, key): value for key, value in actor_options(resources).items() if value}


def world() -> tuple[int, int]:
    """(rank, world size) of this worker."""
    from ray.train import get_context

    context = get_context()
    return context.get_world_rank(), context.get_world_size()


def devices() -> list[torch.device]:
    """The devices Ray Train gives to this worker; it may see those of other workers too."""
    from ray.train.torch import get_devices

    return [torch.device(device) for device in get_devices()]


def data_parallel(module: nn.Module) -> nn.Module:
    """Wrap in DDP when there is more than one worker.

    Every worker loads the same files, so nothing is broadcast at the start: a frozen base need not cross the
    network.
    """
    _, size = world()
    if size == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, init_sync=False)


def synchronise_if(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Within the block gradients are only accumulated here, unless this is the `last` micro-batch of the step."""
    if last or not isinstance(module, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return cast(AbstractContextManager[None], module.no_sync())


def restore(parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Load the last recovery checkpoint, if any; return its state, or `{"step": 0}`."""
    from ray.train import get_checkpoint

    found = get_checkpoint()
    if found is None:
        return {"step": 0}
    with found.as_directory() as directory:
        return load_checkpoint(Path(directory) / "checkpoint", parameters, optimiser)


def checkpoint(
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    state: dict[str, Any],
    metrics: dict[str, float],
) -> None:
    """Report a recovery checkpoint; rank 0 writes it. Every worker must call this at the same step."""
    from ray.train import Checkpoint, report

    rank, _ = world()
    if rank != 0:
        report(metrics)
        return
    with tempfile.TemporaryDirectory() as directory:
        save_checkpoint(Path(directory) / "checkpoint", parameters, optimiser, state)
        report(metrics, checkpoint=Checkpoint.from_directory(directory))
