"""What is read from the state that Ray's autoscaler reports, in Ray's own messages."""

import pytest
from ray.core.generated.autoscaler_pb2 import AutoscalingState

from nexus_ray.cluster.autoscaler import Outlook, reading

OURS = "97728e21cbb15c30ab5f53f79ccb01000000"


def state(**fields) -> AutoscalingState:
    return AutoscalingState(autoscaler_state_version=3, **fields)


def gang(group: str) -> dict:
    return {"details": f"{group}:PACK|PENDING"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Outlook.UNKNOWN),
        ({"infeasible_gang_resource_requests": [gang(OURS)]}, Outlook.NEVER),
        ({"infeasible_gang_resource_requests": [gang("ab" * 18)]}, Outlook.UNKNOWN),
        ({"pending_instance_requests": [{"ray_node_type_name": "gpu", "count": 1}]}, Outlook.COMING),
        ({"pending_instances": [{"ray_node_type_name": "gpu"}]}, Outlook.COMING),
        (
            {
                "infeasible_gang_resource_requests": [gang(OURS)],
                "pending_instances": [{"ray_node_type_name": "cpu"}],  # for somebody else
            },
            Outlook.NEVER,
        ),
    ],
)
def test_what_it_says_of_our_request_counts(fields, expected):
    assert reading(state(**fields), OURS) == (expected, "")


def test_why_a_node_could_not_be_started_is_passed_on():
    failed = [{"ray_node_type_name": "gpu", "reason": "no capacity"}]
    assert reading(state(failed_instance_requests=failed), OURS) == (
        Outlook.COMING,
        "gpu could not be started: no capacity",
    )
