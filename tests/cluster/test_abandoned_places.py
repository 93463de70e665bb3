"""Places that a dead actor had asked for are free again, those of the living are not."""

from __future__ import annotations

import time
from typing import Any

from nexus_ray.cluster.deaths import free_abandoned_places


def _holder() -> type:
    class Holder:
        """Asks for a place in its process; of this function, since workers cannot import this module."""

        def __init__(self) -> None:
            from ray.util.placement_group import placement_group

            self.group = placement_group([{"CPU": 1}])

        def hold(self) -> Any:
            import ray

            ray.get(self.group.ready())
            return self.group

    return Holder


def test_what_a_killed_actor_had_asked_for_is_given_back(ray_session):
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    def state(group: Any) -> str:
        return str(placement_group_table(group)["state"])

    mine = placement_group([{"CPU": 1}])
    killed, alive = (ray.remote(num_cpus=0)(_holder()).remote() for _ in range(2))
    theirs, of_the_living = ray.get([killed.hold.remote(), alive.hold.remote()])
    assert free_abandoned_places() == 0
    ray.kill(killed)
    deadline = time.monotonic() + 60
    while free_abandoned_places() == 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while state(theirs) != "REMOVED":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (state(of_the_living), state(mine)) == ("CREATED", "CREATED")
    ray.kill(alive)
    for group in (mine, of_the_living):
        remove_placement_group(group)
