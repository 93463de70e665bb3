"""Ray: connecting or starting it, finding a place for workers, and giving them work."""

from nexus_ray.cluster.elsewhere import run_on_worker
from nexus_ray.cluster.nodes import needs
from nexus_ray.cluster.placement import find_place
from nexus_ray.cluster.pool import Forecast, map_over_pool
from nexus_ray.cluster.requests import actor_options, bundle, set_worker_threads
from nexus_ray.cluster.session import begin_as_worker, ensure_ray, on_cluster, stop, stop_as_on_ctrl_c

__all__ = [
    "Forecast",
    "actor_options",
    "begin_as_worker",
    "bundle",
    "ensure_ray",
    "find_place",
    "map_over_pool",
    "needs",
    "on_cluster",
    "run_on_worker",
    "set_worker_threads",
    "stop",
    "stop_as_on_ctrl_c",
]
