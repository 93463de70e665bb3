"""Running a training loop on Ray Train: workers, recovery checkpoints, failures.

Ray Train stores the checkpoints that a loop reports, keeps the newest few, hands the last one to restarted
workers, and finds it again when the same run directory is trained after the driver died.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nexus_ray.cluster import actor_options, ensure_ray
from nexus_ray.config import ResourcesSection
from nexus_ray.errors import NexusError
from nexus_ray.training.checkpointing import load_checkpoint, save_checkpoint

logger = logging.getLogger(__name__)


def run_distributed(
    loop: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    directory: Path,
    resources: ResourcesSection,
    keep_checkpoints: int,
) -> None:
    """Run `loop(arguments)` on `resources.workers` Ray Train workers.

    Args:
        loop: training function; it calls `restore` and `checkpoint` of this module.
        arguments: its single argument.
        directory: where Ray Train keeps its state; the same directory resumes.
        resources: what each worker gets.
        keep_checkpoints: recovery checkpoints kept.

    Raises:
        NexusError: the loop failed; carries the worker's message.
    """
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of the configuration must keep working
    ensure_ray()
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    requests = {key.removeprefix("num_").upper().rstrip("S"): value for key, value in _requests(resources).items()}
    trainer = TorchTrainer(
        loop,
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=resources.workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=requests
        ),
        run_config=RunConfig(
            name=directory.name,
            storage_path=str(directory.parent.resolve()),
            failure_config=FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=keep_checkpoints),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise _training_error(error) from error


def _requests(resources: ResourcesSection) -> dict[str, float]:
    options = actor_options(resources)
    return {key: value for key, value in options.items() if value}


def _training_error(error: Exception) -> NexusError:
    """The NexusError a worker raised, when there is one inside Ray's exception; else a general one."""
    failures = getattr(error, "worker_failures", {}) or {}
    for failure in failures.values():
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, NexusError):
            return cause
    return NexusError(f"training failed: {error}", "run the same command again: it continues from the last checkpoint")


def world() -> tuple[int, int]:
    """(rank, world size) of this worker."""
    from ray.train import get_context

    context = get_context()
    return context.get_world_rank(), context.get_world_size()


def device() -> torch.device:
    """The device Ray Train gives to this worker."""
    from ray.train.torch import get_device

    return torch.device(get_device())


def data_parallel(module: nn.Module) -> nn.Module:
    """Wrap in DDP when there is more than one worker.

    Every worker loads the same files, so nothing is broadcast at the start: a frozen base need not cross the
    network.
    """
    _, size = world()
    if size == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, init_sync=False)


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
