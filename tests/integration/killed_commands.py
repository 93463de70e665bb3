"""Commands in processes of their own, with a Ray of their own, and killing all of it without warning."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

PATIENCE_SECONDS = 300  # of each wait: a busy machine takes minutes to start Ray


def start_stage(verb: str, config_path: Path, log: Path, address: str | None = None) -> subprocess.Popen[bytes]:
    """`nexus-ray VERB CONFIG` on the cluster at `address`, else on a Ray of its own; its words are added to `log`."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_ADDRESS": address} if address else {}
    arguments = [sys.executable, "-m", "nexus_ray", verb, str(config_path)]
    with log.open("ab") as output:
        return subprocess.Popen(arguments, env=environment, stdout=output, stderr=output, start_new_session=True)


def kill_with_everything_it_started(process: subprocess.Popen[bytes]) -> None:
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)
    process.wait(timeout=30)
