"""A Ray cluster of several nodes on this machine, and which processes work on it."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_STORE = {"object_store_memory": 100 * 2**20}
_NODE_PATIENCE_SECONDS = 300  # until a new node has joined
_IDLE = "IDLE"
WORKERS = ("MapWorker", "RayTrainWorker", "TrainController")  # other actors of Ray only keep count of these


class Nodes:
    """A head without CPUs and worker nodes, each a raylet of its own.

    Args:
        count: of worker nodes.
        cpus: of each.
        scratch: directory of Ray's session; short, for the paths of sockets are.
    """

    def __init__(self, count: int, cpus: int, scratch: Path) -> None:
        from ray.cluster_utils import Cluster

        self._cpus = cpus
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": str(scratch)}
        # Without hooks for the end of this process: they would be handlers of signals, which threads cannot set.
        self._cluster = Cluster(initialize_head=True, head_node_args=head | _STORE, shutdown_at_exit=False)
        self._lock = threading.Lock()
        for _ in range(count):
            self.add()

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return str(self._cluster.address)

    def add(self) -> None:
        """Start another worker node."""
        with self._lock:
            node = self._cluster.add_node(num_cpus=self._cpus, wait=False, **_STORE)
            self._cluster._wait_for_node(node, timeout=_NODE_PATIENCE_SECONDS)

    def kill_one(self, choose: random.Random) -> str | None:
        """End a worker node's raylet by SIGKILL, which takes its workers; says which, None when there is none."""
        with self._lock:
            nodes = sorted(self._cluster.worker_nodes, key=lambda node: str(node.unique_id))
            if not nodes:
                return None
            victim = choose.choice(nodes)
            self._cluster.remove_node(victim, allow_graceful=False)
            return str(victim.node_id)[:8]

    def actors(self) -> list[tuple[str, psutil.Process]]:
        """(class, process) of every actor on these nodes; Ray writes what a worker runs in its title."""
        found = []
        for node in list(self._cluster.list_all_nodes()):
            for raylet in node.all_processes.get("raylet", ()):
                found += _actors_of(raylet.process.pid)
        return found

    def close(self) -> None:
        """End all nodes."""
        with self._lock:
            self._cluster.shutdown()


def _actors_of(raylet: int) -> list[tuple[str, psutil.Process]]:
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process(raylet).children():
            with suppress(psutil.Error):
                title = (process.cmdline() or [""])[0]
                kind = title.removeprefix("ray::").split("(")[0].split(".")[0].split(":")[0]
                if title.startswith("ray::") and kind != _IDLE:
                    found.append((kind, process))
    return found


@contextmanager
def cluster(count: int, cpus: int, scratch: Path) -> Iterator[Nodes]:
    """A cluster for the block."""
    nodes = Nodes(count, cpus, scratch)
    try:
        yield nodes
    finally:
        nodes.close()


class Census(threading.Thread):
    """Counts the processes that have worked for a stage, by the class of their actor."""

    def __init__(self, nodes: Nodes) -> None:
        super().__init__(daemon=True)
        self._nodes = nodes
        self._seen: set[tuple[str, int]] = set()
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.3):
            self._seen |= {(kind, process.pid) for kind, process in self._nodes.actors() if kind in WORKERS}

    def end(self) -> dict[str, int]:
        """Stop; processes by class."""
        self._ended.set()
        self.join()
        return dict(Counter(kind for kind, _ in self._seen))
