"""A cluster with Ray's fake autoscaler: nodes are processes of this machine, started on demand and ended when idle.

Ray's own `AutoscalingCluster` cannot be used beside anything else: it ends every Ray on the machine before it starts,
and its template is not part of Ray's wheel. So this starts the same node provider by itself.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.util import get_node_ip_address

_START_SECONDS = 180
_OBJECT_STORE = 80 << 20  # bytes, of each node
_MEMORY = 4 << 40  # bytes that a node may have: more than this machine, which is what nodes find


@contextmanager
def autoscaling_cluster(head_cpus: int, most_workers: int, idle_seconds: float) -> Iterator[dict[str, str]]:
    """A head without workers, to which up to so many nodes with one CPU each are added; yields the environment of jobs.

    Args:
        head_cpus: of the head.
        most_workers: nodes beside it.
        idle_seconds: after which a node without work goes away.
    """
    port = _free_port()
    address = f"{get_node_ip_address()}:{port}"
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as directory:
        config = Path(directory) / "autoscaling.json"
        config.write_text(json.dumps(_config(address, head_cpus, most_workers, idle_seconds)))
        log = Path(directory) / "head.log"
        with log.open("w") as output:
            command = _command(config, port, head_cpus, directory)
            head = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=_environment())
        try:
            _wait(head, log)
            yield os.environ | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        finally:
            _end(head)


def _command(config: Path, port: int, cpus: int, directory: str) -> list[str]:
    return [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats",
        f"--autoscaling-config={config}", f"--port={port}", f"--num-cpus={cpus}", f"--temp-dir={directory}/r",
        f"--object-store-memory={_OBJECT_STORE}", "--include-dashboard=false",
        f"--ray-client-server-port={_free_port()}", "--dashboard-agent-listen-port=0",
    ]  # fmt: skip


def _environment() -> dict[str, str]:
    """Of the head, and so of the nodes that its autoscaler starts."""
    own = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",  # what `ray up` and KubeRay choose
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[2]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
    }
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | own


def _config(address: str, head_cpus: int, most_workers: int, idle_seconds: float) -> dict[str, Any]:
    provider = {
        "type": "external",
        "module": "autoscaling_nodes.Nodes",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "gcs_address": address,
        "launch_multiple": True,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    worker = {"CPU": 1, "memory": _MEMORY, "object_store_memory": _OBJECT_STORE}
    return {
        "cluster_name": "fake",
        "provider": provider,
        "max_workers": most_workers,
        "idle_timeout_minutes": idle_seconds / 60,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": most_workers},
        },
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "cluster_synced_files": [],
    }


def _wait(head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while "Ray runtime started" not in log.read_text():
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def _end(head: subprocess.Popen[bytes]) -> None:
    """End the head and all that it has started, the nodes of its autoscaler among them."""
    started = psutil.Process(head.pid).children(recursive=True)
    for process in [*started, psutil.Process(head.pid)]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    head.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
