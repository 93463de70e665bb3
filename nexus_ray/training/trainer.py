"""Running a training loop on Ray Train: workers, failures, what a worker asks about its place among them.

Ray Train starts the workers. When one of them dies or its node is taken away, all of them are started again, as often
as `restarts.py` allows; the loop then continues from its own recovery checkpoint (`recovery.py`), as it does when the
driver died.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nexus_ray import worker_log
from nexus_ray.cluster import begin_as_worker, bundle, find_place, needs
from nexus_ray.cluster.deaths import free_abandoned_places, lost_since, seconds_to_notice
from nexus_ray.cluster.nodes import Node, alive_nodes, room
from nexus_ray.cluster.patience import patience
from nexus_ray.config import ResourcesSection
from nexus_ray.errors import NexusError
from nexus_ray.heartbeat import doing
from nexus_ray.observing import Origin, origin, telling_from
from nexus_ray.observing.links import tell_training
from nexus_ray.observing.trainings import failure_callback
from nexus_ray.storage import Place, cache_root, digest, is_remote, make_directory
from nexus_ray.training.messages import Messages
from nexus_ray.training.recovery import steps_reached
from nexus_ray.training.restarts import Attempts
from nexus_ray.training.stopping import checkpoint_before_stopping
from nexus_ray.training.watching.follow import following
from nexus_ray.versions import driver_versions

logger = logging.getLogger(__name__)


def run_distributed(
    loop: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    directory: Place,
    resources: ResourcesSection,
    steps: int,
    checkpoints: Place,
) -> None:
    """Run `loop(arguments)` on `resources.workers` Ray Train workers.

    Args:
        loop: training function of a worker.
        arguments: its single argument.
        directory: where Ray Train keeps its state, if it is local.
        resources: what each worker gets; with `min_workers` training goes on with as few, and grows again.
        steps: optimiser steps of the whole training.
        checkpoints: directory of the recovery checkpoints: they show whether a training that fails gets on.

    Raises:
        NexusError: there is no place for the workers; or the loop failed: it carries the worker's message.
    """
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of the configuration must keep working
    fewest = resources.min_workers or resources.workers
    selector = find_place("training", resources, fewest)
    tell_training()
    messages = Messages.open()
    attempts = Attempts(resources.max_failures, resources.max_wait_minutes)
    with (
        following(messages.new_records, steps, "train"),
        doing(lambda: worker_log.what_workers_do(needs(resources))),
        patience("training", resources, fewest, selector),
        checkpoint_before_stopping(messages),
    ):
        while not _attempt(
            _trainer(loop, arguments, directory, resources, selector, messages), messages, attempts, checkpoints
        ):
            pass


def _trainer(
    loop: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    directory: Place,
    resources: ResourcesSection,
    selector: dict[str, str],
    messages: Messages,
) -> Any:
    """Ray Train's trainer; what it counts as failures is left to `Attempts`."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    state = _state_directory(directory)
    return TorchTrainer(
        _guarded(loop, messages, origin()),
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            # The annotation is of Ray's first version.
            num_workers=_workers(resources, selector, alive_nodes()),  # type: ignore[arg-type]
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=bundle(resources),
            placement_strategy=resources.placement or "PACK",
            label_selector=selector or None,  # type: ignore[call-arg]
        ),
        run_config=RunConfig(
            name=state.name,
            storage_path=str(state.parent.resolve()),
            # The annotations are those of Ray's first version here too.
            failure_config=FailureConfig(
                max_failures=0,
                controller_failure_limit=0,  # type: ignore[call-arg]
                max_preemption_failures=0,
            ),
            callbacks=[failure_callback(origin())],  # type: ignore[list-item]
        ),
    )


def _attempt(trainer: Any, messages: Messages, attempts: Attempts, checkpoints: Place) -> bool:
    """Train from the last checkpoint; whether that has come to an end.

    Raises:
        NexusError: it failed, and is not tried again.
    """
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    before = alive_nodes()
    worker_log.expect_workers()
    try:
        with _ctrl_c_ours_again():
            trainer.fit()
    except SystemExit as error:  # how Ray Train answers Ctrl-C, after stopping its workers
        raise KeyboardInterrupt from error
    except (TrainingFailedError, RayError) as error:
        if (failure := messages.failure()) is not None:
            raise failure from error
        worker_log.expect_workers()  # nobody is there who could be asked for a checkpoint
        lost = lost_since(before, seconds_to_notice(error))
        free_abandoned_places()
        attempts.after(error, lost, steps_reached(checkpoints))
        return False
    return True


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
_asked = 0.0  # when it last asked the driver
_ASK_EVERY_SECONDS = 1.0


def _guarded(
    loop: Callable[[dict[str, Any]], None], messages: Messages, told: Origin | None
) -> Callable[[dict[str, Any]], None]:
    """`loop`, leaving an error that a user can cause for the driver, and not trying again after one."""
    driver = driver_versions()

    def run(arguments: dict[str, Any]) -> None:
        if (failure := messages.failure()) is not None:
            raise failure
        _tell_through(messages)
        try:
            begin_as_worker("train", driver)
            with telling_from(told, "training worker"):
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


def is_checkpoint_wanted() -> bool:
    """Whether the driver is told to stop and waits for a checkpoint; asks it once a second at most."""
    global _asked
    if _messages is None or time.monotonic() - _asked < _ASK_EVERY_SECONDS:
        return False
    _asked = time.monotonic()
    return bool(_messages.is_checkpoint_wanted())


def checkpoint_is_written() -> None:
    """Tell the driver that it need not wait any more."""
    if _messages is not None:
        _messages.want_checkpoint(False)


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
