"""Runs the stages up to `convert` on the cluster that RAY_ADDRESS names, and prints as JSON where they ran."""

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path

import ray

from nexus_ray.cluster import ensure_ray
from nexus_ray.cluster.nodes import alive_nodes
from nexus_ray.config import load_config
from nexus_ray.console import setup_logging
from nexus_ray.pipeline import run_pipeline
from nexus_ray.router import collect

_NODES = 2
_COMING_SECONDS, _IDLE_SECONDS = 240, 240


class Unhurried(collect.StatisticsCollector):
    """Leaves word of where it is, and goes on when there is another one: so there is work left when that one comes."""

    def __call__(self, row):
        """Process one `Unit`."""
        directory = self.config.run.directory
        here = directory / f"node-{ray.get_runtime_context().get_node_id()}"
        here.touch()
        deadline = time.monotonic() + _COMING_SECONDS
        while len(list(directory.glob("node-*"))) < _NODES and time.monotonic() < deadline:
            time.sleep(0.2)
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


class Elsewhere(logging.Handler):
    """What was logged in other processes and came here."""

    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        if record.process != os.getpid():
            self.said.append(record.getMessage())


def main():
    collect.StatisticsCollector = Unhurried
    setup_logging()
    elsewhere = Elsewhere()
    logging.getLogger("nexus_ray").addHandler(elsewhere)
    ensure_ray()
    nodes = NodeCounts()
    nodes.start()
    [head] = [node.id for node in alive_nodes() if node.is_head]
    config = load_config(Path(sys.argv[1]))
    run_pipeline(config, last="convert")
    deadline = time.monotonic() + _IDLE_SECONDS
    while nodes.counts[-1] and time.monotonic() < deadline:
        time.sleep(0.2)
    nodes.ended.set()
    nodes.join()
    worked = [path.name.removeprefix("node-") for path in config.run.directory.glob("node-*")]
    seen = {"worker_nodes": nodes.counts, "worked": worked, "head": head, "elsewhere": elsewhere.said}
    print(json.dumps(seen))
    ray.shutdown()


if __name__ == "__main__":
    main()
