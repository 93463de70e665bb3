"""Collects router statistics on the cluster that RAY_ADDRESS names, watching its nodes; prints what it saw as JSON."""

import json
import sys
import threading
import time
from pathlib import Path

import ray

from nexus_ray.cluster import ensure_ray
from nexus_ray.cluster.nodes import alive_nodes
from nexus_ray.config import load_config
from nexus_ray.console import setup_logging
from nexus_ray.pipeline import run_single_stage
from nexus_ray.router import collect

_IDLE_SECONDS = 120


class Unhurried(collect.StatisticsCollector):
    """Takes long enough over its units for a second node to come, and says where it is."""

    def __call__(self, row):
        """Process one `Unit`."""
        time.sleep(1.0)
        return super().__call__(row)


class NodeCounts(threading.Thread):
    """The numbers of worker nodes, one after the other, as they change."""

    def __init__(self):
        super().__init__(daemon=True)
        self.counts = []
        self.ended = threading.Event()

    def run(self):
        while not self.ended.wait(0.2):
            count = sum(not node.is_head for node in alive_nodes())
            if self.counts[-1:] != [count]:
                self.counts.append(count)
                print(f"{time.strftime('%H:%M:%S')} {count} worker node(s)", file=sys.stderr)


def main():
    collect.StatisticsCollector = Unhurried
    setup_logging()
    ensure_ray()
    nodes = NodeCounts()
    nodes.start()
    run_single_stage(load_config(Path(sys.argv[1])), "collect")
    deadline = time.monotonic() + _IDLE_SECONDS
    while nodes.counts[-1] and time.monotonic() < deadline:
        time.sleep(0.2)
    nodes.ended.set()
    nodes.join()
    print(json.dumps({"worker_nodes": nodes.counts}))
    ray.shutdown()


if __name__ == "__main__":
    main()
