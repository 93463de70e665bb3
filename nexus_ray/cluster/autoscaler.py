"""What an autoscaler makes of a request that no node can hold: whether it starts one, or has none to start.

Ray has no public interface for it. What is read here is what `ray status` shows; where a release of Ray keeps it
elsewhere the answer is that nothing is known.
"""

from __future__ import annotations

import json
import logging
from enum import Enum
from typing import Any

logger = logging.getLogger(__name__)


class Outlook(Enum):
    """What is to be expected of an autoscaler."""

    COMING = "a node is on its way"
    NEVER = "it has no kind of node that would do"
    UNKNOWN = "it says nothing, or there is none"


def outlook(placement_group: str) -> tuple[Outlook, str]:
    """What the autoscaler makes of a placement group that waits, and why a node could not be started, if so.

    Args:
        placement_group: its id in hexadecimal digits.
    """
    try:
        state = _state()
        return reading(state, placement_group) if state.autoscaler_state_version else (_outlook_of_first_version(), "")
    except Exception as error:  # internals of Ray: anything may be different in another release
        logger.debug("cannot ask the autoscaler: %s: %s", type(error).__name__, error)
        return Outlook.UNKNOWN, ""


def is_reporting() -> bool:
    """Whether this cluster's monitor is one that answers `outlook`, even if it has not begun to."""
    try:
        from ray.autoscaler.v2.utils import is_autoscaler_v2

        return bool(is_autoscaler_v2(fetch_from_server=True))
    except Exception as error:
        logger.debug("cannot ask for the autoscaler: %s: %s", type(error).__name__, error)
        return False


def reading(state: Any, placement_group: str) -> tuple[Outlook, str]:
    """The same of an `AutoscalingState`, as Ray's `autoscaler.proto` describes it."""
    if any(placement_group in gang.details for gang in state.infeasible_gang_resource_requests):
        return Outlook.NEVER, ""
    failed, reason = state.failed_instance_requests, ""
    if failed:
        reason = f"{failed[-1].ray_node_type_name} could not be started: {failed[-1].reason or 'no reason is given'}"
    if state.pending_instance_requests or state.pending_instances or failed:
        return Outlook.COMING, reason
    return Outlook.UNKNOWN, ""


def _state() -> Any:
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    client = GcsClient(ray.get_runtime_context().gcs_address)
    return GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=5)).autoscaling_state


def _outlook_of_first_version() -> Outlook:
    """What the autoscaler's first version says: whether it is starting nodes, for whatever request."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    status = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    report = json.loads(status).get("autoscaler_report") if status else None
    is_starting = bool(report and (report["pending_launches"] or report["pending_nodes"]))
    return Outlook.COMING if is_starting else Outlook.UNKNOWN
