"""How many workers Ray Train is asked for, and where it may choose."""

import pytest

from nexus_ray.cluster.nodes import Node, away_from_head
from nexus_ray.config import ResourcesSection
from nexus_ray.training.trainer import _workers

HEAD, BARE_HEAD = Node("head", "head", True, {"CPU": 8}), Node("head", "head", True, {})
OTHERS = [Node("a", "a", False, {"CPU": 2}), Node("b", "b", False, {"CPU": 1})]


@pytest.mark.parametrize(
    ("resources", "head", "avoided", "expected"),
    [
        ({"workers": 4}, HEAD, True, 4),
        ({"workers": 4, "min_workers": 4}, HEAD, True, 4),
        ({"workers": 4, "min_workers": 2}, BARE_HEAD, True, (2, 4)),
        ({"workers": 4, "min_workers": 2}, HEAD, False, (2, 4)),
        ({"workers": 4, "min_workers": 2}, HEAD, True, 3),  # Ray Train would count on the head: 4, and one never comes
        ({"workers": 2, "min_workers": 1}, HEAD, True, 2),
        ({"workers": 4, "min_workers": 2, "gpus_per_worker": 1}, HEAD, True, (2, 4)),  # it has no GPU
    ],
)
def test_workers_shrink_and_grow_unless_the_head_would_be_counted(resources, head, avoided, expected):
    selector = away_from_head([head]) if avoided else {}
    assert _workers(ResourcesSection(**resources), selector, [head, *OTHERS]) == expected
