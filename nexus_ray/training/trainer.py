"""Running a training loop on Ray Train: workers, failures, what a worker asks about its place among them.

Ray Train starts the workers, and starts all of them again when one of them dies or its node is taken away; the loop
then continues from its own recovery checkpoint (`recovery.py`), as it does when the driver died.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nexus_ray.cluster import actor_options, ensure_ray
from nexus_ray.config import ResourcesSection
from nexus_ray.errors import NexusError
from nexus_ray.storage import Place, cache_root, digest, is_remote, make_directory
from nexus_ray.training.messages import Messages
from nexus_ray.training.watching.follow import following

logger = logging.getLogger(__name__)


def run_distributed(
    loop: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    directory: Place,
    resources: ResourcesSection,
    steps: int,
) -> None:
    """Run `loop(arguments)` on `resources.workers` Ray Train workers.

    Args:
        loop: training function of a worker.
        arguments: its single argument.
        directory: where Ray Train keeps its state, if it is local.
        resources: what each worker gets; with `min_workers` training goes on with as few, and grows again.
        steps: optimiser steps of the whole training.

    Raises:
        NexusError: the loop failed; carries the worker's message.
    """
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of the configuration must keep working
    ensure_ray()
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    messages, state = Messages.open(), _state_directory(directory)
    trainer = TorchTrainer(
        _guarded(loop, messages),
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=_workers(resources),  # type: ignore[arg-type]  # Ray's annotation is of its first version
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=_requests(resources),
        ),
        run_config=RunConfig(
            name=state.name,
            storage_path=str(state.parent.resolve()),
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )
    try:
        with following(messages.new_records, steps, "train"), _ctrl_c_ours_again():
            trainer.fit()
    except SystemExit as error:  # how Ray Train answers Ctrl-C, after stopping its workers
        raise KeyboardInterrupt from error
    except Exception as error:
        failure = messages.failure()
        if failure is not None:
            raise failure from error
        raise NexusError(
            f"training failed: {error}", "run the same command again: it continues from the last checkpoint"
        ) from error


@contextmanager
def _ctrl_c_ours_again() -> Iterator[None]:
    """Undo what Ray Train does to Ctrl-C: after a training it would be ignored, and at the third time exit with 0."""
    ours = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, ours)


def _state_directory(directory: Place) -> Path:
    """Where Ray Train keeps its state: there, or in the cache of this node where that is in an object store.

    All that is kept is a marker, since no checkpoint is given to Ray Train, and only its controller reads it, which
    runs on the node of the driver: nothing is lost with the node, and no request can fail.
    """
    if not is_remote(directory):
        return make_directory(directory)
    return make_directory(cache_root() / "ray-train" / digest(str(directory))[:16])


_messages: Messages | None = None  # of a worker


def _guarded(loop: Callable[[dict[str, Any]], None], messages: Messages) -> Callable[[dict[str, Any]], None]:
    """`loop`, leaving an error that a user can cause for the driver, and not trying again after one."""

    def run(arguments: dict[str, Any]) -> None:
        if (failure := messages.failure()) is not None:
            raise failure
        _tell_through(messages)
        try:
            loop(arguments)
        except NexusError as error:
            messages.fail(error)
            raise
        finally:
            messages.delivered()

    return run


def _tell_through(messages: Messages) -> None:
    """Its own function: Ray sends `run` by value, and a module's variables do not go with it."""
    global _messages
    _messages = messages


def tell_driver(record: Mapping[str, Any]) -> None:
    """Let the driver see a record of this worker; outside a worker nobody does."""
    if _messages is not None:
        _messages.tell(record)


def _workers(resources: ResourcesSection) -> int | tuple[int, int]:
    """How many workers, or the fewest and the most."""
    fewest = resources.min_workers
    return resources.workers if fewest in (None, resources.workers) else (fewest, resources.workers)


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
    network. Looking for unused parameters keeps DDP from rearranging its buckets after the first step: a sum over three
    or more workers would then be rounded differently in the first step after a restart.
    """
    _, size = world()
    if size == 1:
        return module
    return nn.parallel.DistributedDataParallel(
        module, broadcast_buffers=False, init_sync=False, find_unused_parameters=True
    )


def synchronise_if(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Within the block gradients are only accumulated here, unless this is the `last` micro-batch of the step."""
    if last or not isinstance(module, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return cast(AbstractContextManager[None], module.no_sync())


def sum_over_workers(values: Tensor) -> Tensor:
    """Add `values` over all workers, in place."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def gathered(values: list[str]) -> list[str]:
    """The values of all workers, in the order of their ranks; all of them must call it."""
    if not torch.distributed.is_initialized():
        return values
    lists: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(lists, values)
    return [value for of_worker in lists for value in of_worker]


def from_first_worker(value: str | None) -> str | None:
    """What rank 0 says, on every worker; all of them must call it."""
    from ray.train.collective import broadcast_from_rank_zero

    return cast("str | None", broadcast_from_rank_zero(value))


def node_is_leaving() -> bool:
    """Whether a node of this training is about to be taken away (a preemption notice); all workers must call it."""
    from ray.train import get_preemption_info

    return get_preemption_info() is not None


def tell_ray(metrics: dict[str, float]) -> None:
    """Show metrics in Ray's dashboard; all workers must call it."""
    from ray.train import report

    report(metrics)
