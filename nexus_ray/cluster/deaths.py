"""What has died: nodes that are not there any more, and workers that ended untimely, for want of memory or not."""

from __future__ import annotations

import time
from collections.abc import Iterable

from nexus_ray.cluster.nodes import Node, alive_nodes

NOTICED_SECONDS = 30.0  # within which Ray notices that a node is gone: 5 health checks, 3 s apart, and some more
_SHUTDOWN_SECONDS = 10.0  # between the end of a worker and that of its node, where a node is shut down
_NODE_LIVES_WORDS = ("its worker process has died", "running low on memory")  # only a node that lives can tell
_OUT_OF_MEMORY_WORDS = ("OutOfMemoryError", "running low on memory")
OUT_OF_MEMORY_HINT = (
    "`nexus-ray plan CONFIG` says what a worker needs; resources.memory_gib_per_worker keeps a node from getting more "
    "workers than it has memory for, fewer resources.workers or smaller batches need less"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a worker was ended because its node was short of memory; Ray has only words for it."""
    text = f"{type(error).__name__}: {error}"
    return any(sign in text for sign in _OUT_OF_MEMORY_WORDS)


def is_preemption(error: BaseException) -> bool:
    """Whether an error says that work ended because its node was to be taken away, which Ray had been told before."""
    return type(error).__name__ == "PreemptionError"


def seconds_to_notice(error: BaseException) -> float:
    """How long it may take until a node is known to be lost whose loss has caused an error."""
    if is_preemption(error):
        return 0.0
    return _SHUTDOWN_SECONDS if any(words in str(error) for words in _NODE_LIVES_WORDS) else NOTICED_SECONDS


def lost_since(before: Iterable[Node], patience: float = NOTICED_SECONDS) -> set[str]:
    """Ids of the nodes that were there `before` and are not any more.

    A worker of a lost node is missed sooner than the node itself: where there are others, it is waited for so long.
    """
    ids = {node.id for node in before}
    deadline = time.monotonic() + (patience if len(ids) > 1 else 0)
    while True:
        lost = ids - {node.id for node in alive_nodes()}
        if lost or time.monotonic() >= deadline:
            return lost
        time.sleep(0.5)


def dead_workers() -> dict[bytes, bool]:
    """This job's workers that ended untimely on nodes that are still there: by id, whether for want of memory.

    Ray's public interfaces say it of the first death of an actor only by the dashboard, which may not be there.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.common_pb2 import WorkerExitType  # type: ignore[attr-defined]
    from ray.core.generated.gcs_pb2 import WorkerTableData  # type: ignore[attr-defined]

    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    found = {}
    for row in state._connect_and_get_accessor().get_worker_table():
        worker = WorkerTableData.FromString(row)
        is_memory = worker.exit_type == WorkerExitType.NODE_OUT_OF_MEMORY
        if (
            not worker.is_alive
            and worker.job_id == job
            and (is_memory or worker.exit_type == WorkerExitType.SYSTEM_ERROR)
        ):
            found[bytes(worker.worker_address.worker_id)] = is_memory
    return found


def free_abandoned_places() -> int:
    """Remove this job's placement groups whose maker, an actor, has died; returns how many there were.

    Ray keeps them as long as the job lives. Ray Train removes those of a controller that died by asking Ray's
    dashboard, which may not be there: the next controller would wait for places that nobody has.
    """
    import ray
    from ray import ActorID, PlacementGroupID
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job, removed = bytes.fromhex(ray.get_runtime_context().get_job_id()), 0
    for row in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        is_of_an_actor = not ActorID(group.creator_actor_id).is_nil()
        is_there = group.state != PlacementGroupTableData.PlacementGroupState.REMOVED and not group.is_detached
        if group.creator_job_id == job and is_of_an_actor and group.creator_actor_dead and is_there:
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
            removed += 1
    return removed
