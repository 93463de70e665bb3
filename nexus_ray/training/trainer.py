"""Running a training loop on Ray Train: workers, failures, what a worker asks about its place among them.

Ray Train starts the workers, and starts all of them again when one of them dies or its node is taken away; the loop
then continues from its own recovery checkpoint (`recovery.py`), as it does when the driver died.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nexus_ray.cluster import bundle, find_place
from nexus_ray.cluster.nodes import Node, alive_nodes, room
from nexus_ray.config import ResourcesSection
from nexus_ray.errors import NexusError, error_from_record, error_to_record
from nexus_ray.storage import make_directory, read_json, write_json
from nexus_ray.training.watching.follow import following

logger = logging.getLogger(__name__)


def run_distributed(
    loop: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    directory: Path,
    resources: ResourcesSection,
    metrics: Path,
    steps: int,
) -> None:
    """Run `loop(arguments)` on `resources.workers` Ray Train workers.

    Args:
        loop: training function of a worker.
        arguments: its single argument.
        directory: where Ray Train keeps its state.
        resources: what each worker gets; with `min_workers` training goes on with as few, and grows again.
        metrics: the file that the loop writes its metrics to; progress is read from it.
        steps: optimiser steps of the whole training.

    Raises:
        NexusError: there is no place for the workers; or the loop failed: it carries the worker's message.
    """
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of the configuration must keep working
    selector = find_place("training", resources, resources.min_workers or resources.workers)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    error_file = make_directory(directory) / "error.json"
    trainer = TorchTrainer(
        _guarded(loop, error_file),
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=_workers(resources, selector, alive_nodes()),  # type: ignore[arg-type]  # Ray's annotation is of its first version
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=bundle(resources),
            placement_strategy=resources.placement or "PACK",
            label_selector=selector or None,  # type: ignore[call-arg]
        ),
        run_config=RunConfig(
            name=directory.name,
            storage_path=str(directory.parent.resolve()),
            failure_config=FailureConfig(max_failures=resources.max_failures),
        ),
    )
    error_file.unlink(missing_ok=True)
    try:
        with following(metrics, steps, "train"), _ctrl_c_ours_again():
            trainer.fit()
    except SystemExit as error:  # how Ray Train answers Ctrl-C, after stopping its workers
        raise KeyboardInterrupt from error
    except Exception as error:
        if error_file.exists():
            raise error_from_record(read_json(error_file, what="error record", hint="run again")) from error
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


def _guarded(loop: Callable[[dict[str, Any]], None], error_file: Path) -> Callable[[dict[str, Any]], None]:
    """`loop`, leaving an error that a user can cause where the driver finds it, and not trying again after one."""

    def run(arguments: dict[str, Any]) -> None:
        if error_file.exists():
            raise error_from_record(read_json(error_file, what="error record", hint="run again"))
        try:
            loop(arguments)
        except NexusError as error:
            with suppress(NexusError):  # on a full disk this one is the second to be told
                write_json(error_file, error_to_record(error))
            raise

    return run


def _workers(resources: ResourcesSection, selector: dict[str, str], nodes: Sequence[Node]) -> int | tuple[int, int]:
    """How many workers, or the fewest and the most.

    Where Ray Train may choose, it counts what the head has too, although no worker may be there, and would wait for
    ever for the one that is too many. Then it has no choice: as many as the other nodes have room for.
    """
    fewest, request = resources.min_workers, bundle(resources)
    if fewest in (None, resources.workers):
        return resources.workers
    if not (selector and any(node.is_head and node.holds(request) for node in nodes)):
        return fewest, resources.workers
    others = room(request, [node for node in nodes if not node.is_head])
    number = min(max(fewest, others), resources.workers)
    logger.warning(
        "training: %d workers from beginning to end: it can shrink and grow only where the head has nothing that a "
        "worker needs (ray start --head --num-cpus=0), or with resources.use_head=true",
        number,
    )
    return number


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
