"""Run by `test_killed_by_memory.py`: workers that take more memory than Ray's memory monitor lets them have.

Prints one JSON object: what came of each.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from nexus_ray.cluster import map_over_pool
from nexus_ray.config import ResourcesSection
from nexus_ray.errors import NexusError
from nexus_ray.training.trainer import run_distributed

FREE_BYTES = int(float(sys.argv[1]) * 2**30)  # what workers may take before the monitor ends them
CHUNK = 64 * 2**20
RESOURCES = ResourcesSection(workers=1, max_failures=1)


def take_too_much() -> None:
    """Take memory until the monitor ends this process; stop before the machine has none left."""
    held = []
    while len(held) * CHUNK < 3 * FREE_BYTES:
        held.append(b"x" * CHUNK)
        time.sleep(0.02)
    time.sleep(60)  # the monitor may be slow to look


class TakesTooMuch:
    """Worker that takes too much at one of its items: each time, or only while its flag is missing."""

    def __init__(self, flag: Path | None, *, at_start: bool = False) -> None:
        self.flag = flag
        if at_start:
            take_too_much()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["item"] == 1 and not (self.flag and self.flag.exists()):
            if self.flag:
                self.flag.touch()
            take_too_much()
        return {"item": row["item"]}


def pool(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a pool of such workers gives."""
    items = [{"item": number} for number in range(3)]
    try:
        rows = list(map_over_pool(TakesTooMuch, arguments, items, RESOURCES, "hogging"))
    except NexusError as error:
        return {"message": error.message, "hint": error.hint}
    return {"items": sorted(int(row["item"]) for row in rows)}


def train(folder: Path) -> dict[str, Any]:
    """What a training of such workers gives."""
    folder.mkdir()
    attempts = folder / "attempts"
    attempts.touch()

    def loop(_: dict[str, Any]) -> None:
        with attempts.open("a") as file:
            file.write("x")
        take_too_much()

    try:
        run_distributed(loop, {}, folder / "training", RESOURCES, steps=1, checkpoints=folder)
    except NexusError as error:
        return {"message": error.message, "hint": error.hint, "attempts": len(attempts.read_text())}
    return {}


def main() -> None:
    """Start a Ray whose monitor is strict, and try each."""
    memory = psutil.virtual_memory()
    threshold = (memory.total - memory.available + FREE_BYTES) / memory.total
    import ray

    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as scratch:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=scratch,
            _system_config={"memory_usage_threshold": threshold, "memory_monitor_refresh_ms": 250},
        )
        folder = Path(scratch)
        results = {
            "once": pool({"flag": folder / "flag"}),
            "each_time": pool({"flag": None}),
            "at_start": pool({"flag": None, "at_start": True}),
            "training": train(folder / "run"),
        }
        print(json.dumps(results), flush=True)
        ray.shutdown()


if __name__ == "__main__":
    main()
