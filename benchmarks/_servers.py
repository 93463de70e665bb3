"""Servers that benchmarks measure: ours on Ray Serve, and `transformers serve`, each a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from nexus_ray.errors import NexusError

ROOT = Path(__file__).parents[1]
TINY = ROOT / "assets" / "tiny-gpt-oss"  # the embedded model
_START_SECONDS = 300
_STOP_SECONDS = 60


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def server(command: Sequence[str], port: int, ready: str, log: Path, threads: int) -> Iterator[str]:
    """A server while the block runs; yields its address.

    Args:
        command: starts it.
        port: where it will listen.
        ready: path that answers 200 once it is up.
        log: file for what it prints.
        threads: torch's, where the server does not set them itself.

    Raises:
        NexusError: it does not come up.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        address = f"http://127.0.0.1:{port}"
        try:
            _wait(process, address + ready, log)
            yield address
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise NexusError(f"the server did not come up at {url}; its last lines:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and what it started."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_of(folder: Path, model: Path, overlay: Path, dtype: str) -> list[str]:
    """Overrides of the demo's configuration for a run directory `bard` that has this overlay."""
    run = folder / "bard"
    run.mkdir(parents=True)
    (run / "overlay").symlink_to(overlay.resolve())
    return [f"run.directory={run}", f"model.path={model}", f"model.dtype={dtype}"]


def our_command(port: int, overrides: Sequence[str]) -> list[str]:
    """`nexus-ray serve`."""
    config = str(ROOT / "configs" / "demo.yaml")
    return [sys.executable, "-m", "nexus_ray", "serve", config, f"serve.port={port}", *overrides]


def transformers_command(model: Path, port: int, dtype: str, *, batching: bool) -> list[str]:
    """`transformers serve`, with bounds where it batches: without them its cache takes most of the memory."""
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(model), "--port", str(port)]
    command += ["--dtype", dtype]
    bounds = ["--continuous-batching", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "512"]
    return command + (bounds if batching else [])
