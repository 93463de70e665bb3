"""A Ray cluster of a test's own, with the dashboard that jobs are submitted to, and jobs on it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from killed_commands import PATIENCE_SECONDS, kill_with_everything_it_started

ROOT = Path(__file__).parents[2]
_ATTEMPTS = 3  # Ray gives its own processes 30 seconds to start, which a busy machine may not
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


def wait_until(met: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """What `met` returns once it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := met():
            return found
        time.sleep(0.05)
    raise AssertionError(f"in vain: {what}")


class PrivateCluster:
    """One node that is head and worker; `with` starts it, and kills it with everything on it."""

    def __enter__(self) -> PrivateCluster:
        for _ in range(_ATTEMPTS):
            self._start()
            wait_until(lambda: self._is_up() or self.process.poll() is not None, "Ray has started, or given up")
            if self._is_up():
                wait_until(lambda: self._answers("/api/jobs/"), "the dashboard answers")
                return self
            self.__exit__()
        raise AssertionError("Ray has not started")

    def _start(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="nr", dir="/tmp"))  # Ray's sockets need short paths
        gcs, dashboard, agent = free_ports(3)
        self.url = f"http://127.0.0.1:{dashboard}"
        removed = ("RAY_ADDRESS", "PYTHONPATH")  # workers must find the code by themselves
        self.environment = {name: value for name, value in os.environ.items() if name not in removed}
        self.environment |= {"RAY_AUTH_MODE": "disabled", "RAY_API_SERVER_ADDRESS": self.url}
        # A job's `python` is the first on the cluster's path, and the tests may run without that of their environment.
        self.environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        # On a machine that is busy with other tests a node may not answer for a while; it is not lost.
        self.environment |= {"RAY_health_check_timeout_ms": "60000", "RAY_health_check_failure_threshold": "10"}
        command = [*RAY, "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}"]
        command += [f"--dashboard-agent-listen-port={agent}", "--num-cpus=4", f"--temp-dir={self.directory}"]
        command += ["--disable-usage-stats", "--object-store-memory=200000000"]
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(command, env=self.environment, stdout=said, stderr=said)

    @property
    def _said(self) -> Path:
        return self.directory / "ray-start.log"

    def _is_up(self) -> bool:
        return "Ray runtime started" in self._said.read_text()

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            kill_with_everything_it_started(self.process)
        shutil.rmtree(self.directory, ignore_errors=True)

    def submit(self, script: str, *arguments: object) -> str:
        """`ray job submit`, of this repository; the job's id."""
        job = f"{script}-{time.monotonic_ns()}"
        options = ["--no-wait", f"--submission-id={job}", "--working-dir=.", "--runtime-env=deploy/runtime_env.yaml"]
        command = ["submit", *options, "--", "python", f"jobs/{script}.py", *map(str, arguments)]
        wait_until(lambda: self._ray(*command, unless="No available agent"), "an agent that takes the job")
        return job

    def stop(self, job: str) -> None:
        """`ray job stop`; returns when the job has stopped."""
        self._ray("stop", job)

    def stop_at_once(self, job: str) -> None:
        """The same, without the seconds that the command takes to start and without waiting."""
        request = urllib.request.Request(f"{self.url}/api/jobs/{job}/stop", data=b"", method="POST")
        urllib.request.urlopen(request, timeout=PATIENCE_SECONDS).close()

    def status(self, job: str) -> str:
        return str(self._get(f"/api/jobs/{job}")["status"])

    def message(self, job: str) -> str:
        return str(self._get(f"/api/jobs/{job}")["message"])

    def log(self, job: str) -> list[str]:
        return str(self._get(f"/api/jobs/{job}/logs")["logs"]).splitlines()

    def wait_for(self, job: str, met: Callable[[], Any], what: str) -> None:
        """Wait for what a job does; one that ends without having done it is not waited for any longer."""
        wait_until(lambda: met() or self.status(job) in _ENDED, what)
        assert met(), f"in vain: {what}; the job {job}: {self.message(job)}; {self.log(job)}"

    def wait_for_end(self, job: str) -> str:
        """The status it ends with."""
        return wait_until(lambda: status if (status := self.status(job)) in _ENDED else None, "an end")

    def processes(self, *titles: str) -> list[psutil.Process]:
        """Processes of the cluster whose command line has one of these words; Ray writes what a worker runs there."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if any(title in part for part in process.cmdline() for title in titles):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def _ray(self, *arguments: str, unless: str | None = None) -> bool:
        """`ray job`; false when it failed with this message, which it may do while the cluster is new."""
        command = [*RAY, "job", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
        if done.returncode and unless is not None and unless in done.stderr:
            return False
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:] + self._said.read_text()[-2000:]
        return True

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE_SECONDS) as answer:
            return json.load(answer)

    def _answers(self, path: str) -> bool:
        assert self.process.poll() is None, f"the cluster has ended: {self._said.read_text()[-2000:]}"
        try:
            self._get(path)
        except (urllib.error.URLError, OSError):
            return False
        return True
