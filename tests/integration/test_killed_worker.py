"""One worker of `nexus-ray collect` killed without warning: the job goes on and ends with the same files."""

import shutil
import signal
import threading
from pathlib import Path

import psutil
import pytest

from nexus_ray.config import Config
from nexus_ray.layout import RunLayout
from nexus_ray.router.collect import collect
from nexus_ray.storage import sha256_file

pytestmark = pytest.mark.ray
_SMALL_UNITS = {"collect.batch_sequences": 1, "collect.unit_batches": 1, "collect.tokens": 8192}


def pool_workers() -> list[psutil.Process]:
    """Processes of this session's Ray that run the actors of a pool; Ray writes what they run in their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapWorker"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


class Killer(threading.Thread):
    """Kills one worker of the pool as soon as a few parts are there; remembers how many there were.

    Args:
        parts: directory of the parts.
        others: workers of earlier pools, which may not be gone yet.
    """

    def __init__(self, parts: Path, others: set[int]) -> None:
        super().__init__(daemon=True)
        self.parts = parts
        self.others = others
        self.job_ended = threading.Event()
        self.killed: int | None = None
        self.done = 0

    def run(self) -> None:
        while not self.job_ended.wait(0.005):
            self.done = len(list(self.parts.glob("unit-*.safetensors")))
            workers = [process for process in pool_workers() if process.pid not in self.others]
            if self.done >= 3 and workers:
                self.killed = workers[0].pid
                workers[0].send_signal(signal.SIGKILL)
                return


def digests(layout: RunLayout) -> list[str]:
    return [sha256_file(path) for path in (layout.router_stats, layout.router_stats.with_suffix(".json"))]


def collect_with_a_death(config: Config, layout: RunLayout) -> Killer:
    """Collect while a worker of the pool is killed."""
    killer = Killer(layout.directory / "router_stats.partial", {process.pid for process in pool_workers()})
    killer.start()
    try:
        collect(config, layout)
    finally:
        killer.job_ended.set()
        killer.join()
    return killer


@pytest.mark.usefixtures("ray_session")
def test_a_worker_killed_in_the_middle_is_replaced_and_the_files_are_the_same(make_micro_config, tmp_path):
    config = make_micro_config(tmp_path / "whole", **_SMALL_UNITS)
    whole = RunLayout(config.run.directory)
    samples = collect(config, whole).description.calibration
    for workers in (1, 2):
        config = make_micro_config(tmp_path / f"killed-{workers}", **_SMALL_UNITS, **{"resources.workers": workers})
        layout = RunLayout(config.run.directory)
        layout.directory.mkdir()
        for path in (whole.calibration, whole.calibration.with_suffix(".json")):
            shutil.copy(path, layout.directory)
        killer = collect_with_a_death(config, layout)
        assert killer.killed is not None
        assert not psutil.pid_exists(killer.killed)
        assert killer.done < sum(sample.sequences for sample in samples.values()) / 2, "it was killed in the middle"
        assert digests(layout) == digests(whole)
        assert not killer.parts.exists()
