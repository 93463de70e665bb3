"""What a run tells of itself: events in its directory, metrics for Prometheus, links to Ray's dashboard."""

from nexus_ray.observing.command import Origin, origin, record, telling, telling_from
from nexus_ray.observing.stage import Tally, telling_stage

__all__ = ["Origin", "Tally", "origin", "record", "telling", "telling_from", "telling_stage"]
