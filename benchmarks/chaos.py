"""The pipeline on a cluster whose nodes and workers are killed at random moments: the same bytes in the end.

    python benchmarks/chaos.py

Claims: `nexus-ray run` on a cluster of several nodes of this machine (a head without CPUs, worker nodes with one each)
finishes by itself while random worker nodes (SIGKILL of the raylet, which takes its workers; a new node comes after a
while, as an autoscaler would bring one) and random workers (SIGKILL) are ended in every stage that uses Ray; and
`identical`: statistics, selection, targets and overlay have the bytes of an undisturbed run, which is made first, in
the same way; the figures of the report are the same too. Ends with one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _chaos import Killer, Progress, draw_kills
from _chaos_nodes import Census, Nodes, cluster
from _common import command_line, print_result

from nexus_ray.errors import NexusError
from nexus_ray.layout import RunLayout
from nexus_ray.storage import digest, sha256_file
from nexus_ray.training.watching.metrics import read_metrics

logger = logging.getLogger("nexus_ray.chaos")
ROOT = Path(__file__).parents[1]
_DISTURBED = ("collect", "precompute", "train", "evaluate")  # the stages that use Ray
# Enough to do in each stage to be hit several times, and no more: a work in small pieces, some minutes in all.
_OVERRIDES = (
    "collect.tokens=131072",
    "collect.candidates=4",
    "collect.unit_batches=1",
    "targets.max_tokens=98304",
    "data.shard_bytes=32768",
    "train.steps=80",
    "train.checkpoint_every=10",
    "train.validate_every=40",
    "train.validation_sequences=16",
    "evaluate.max_sequences_per_source=32",
    "evaluate.samples.per_source=0",
)
_MOST_COMMANDS = 20


def artefacts(layout: RunLayout, *, evaluated: bool) -> dict[str, list[Path]]:
    """What is compared, by name: its files."""
    found = {
        "calibration": [layout.calibration, layout.calibration.with_suffix(".json")],
        "statistics": [layout.router_stats, layout.router_stats.with_suffix(".json")],
        "selection": [layout.selection],
        "initial_overlay": _files(layout.initial_overlay),
        "targets": _files(layout.targets),
        "overlay": _files(layout.overlay),
    }
    return found | ({"evaluation": [layout.report]} if evaluated else {})


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def digests(layout: RunLayout, *, evaluated: bool) -> dict[str, str]:
    """One digest an artefact, of the names and bytes of its files."""
    return {
        name: digest([[str(path.relative_to(layout.directory)), _bytes_of(path)] for path in paths])
        for name, paths in artefacts(layout, evaluated=evaluated).items()
    }


def _bytes_of(path: Path) -> str:
    """SHA-256 of a file; of a report without what it tells of places and times."""
    return digest(json.loads(path.read_text())["evaluation"]) if path.name == "report.json" else sha256_file(path)


def run_command(
    arguments: argparse.Namespace, layout: RunLayout, address: str, log: Path, killer: Killer | None
) -> int:
    """`nexus-ray run` in a process of its own, as a submitted job is; given again when its process is killed.

    Returns:
        how often it was given.

    Raises:
        NexusError: it failed.
    """
    command = [sys.executable, "-m", "nexus_ray", "run", str(arguments.config), "--until", arguments.until]
    command += [f"run.directory={layout.directory}", f"resources.workers={arguments.workers}"]
    command += [*_OVERRIDES, *arguments.overrides]
    environment = os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    for number in range(1, _MOST_COMMANDS + 1):
        with log.open("ab") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=ROOT)
        if killer is not None:
            killer.driver = process
        try:
            code = process.wait(arguments.timeout * 60)
        except subprocess.TimeoutExpired as error:
            raise NexusError(f"it hangs: no end after {arguments.timeout} minutes; {tail(log)}") from error
        finally:
            if process.poll() is None:
                process.kill()
        if code == 0:
            return number
        if code > 0:
            break
        logger.warning("the command was killed (%d): it is given again", code)
    raise NexusError(f"the command ended with {code}: {tail(log)}")


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-3000:]


def undisturbed(arguments: argparse.Namespace, folder: Path) -> tuple[RunLayout, dict[str, Any]]:
    """The run that nothing happens to."""
    layout = RunLayout(folder / "undisturbed")
    progress = Progress(layout)
    progress.start()
    with cluster(arguments.nodes, 1, arguments.scratch) as nodes:
        result = watched(arguments, layout, nodes, folder / "undisturbed.log")
    return layout, result | {"work": progress.end()}


def disturbed(arguments: argparse.Namespace, folder: Path, work: dict[str, int]) -> tuple[RunLayout, dict[str, Any]]:
    """The run whose nodes and workers are killed, each when so much `work` of a stage is done."""
    layout = RunLayout(folder / "disturbed")
    choose = random.Random(arguments.seed)
    counts = {"node": arguments.node_kills, "process": arguments.process_kills, "driver": arguments.driver_kills}
    kills = draw_kills([stage for stage in _DISTURBED if stage in work], counts, choose)
    with cluster(arguments.nodes, 1, arguments.scratch) as nodes:
        killer = Killer(nodes, layout, kills, work, choose, (arguments.pause, 3 * arguments.pause))
        killer.start()
        try:
            result = watched(arguments, layout, nodes, folder / "disturbed.log", killer)
        finally:
            killer.end()
    return layout, result | {"kills": killer.done, "planned": len(kills)}


def watched(
    arguments: argparse.Namespace, layout: RunLayout, nodes: Nodes, log: Path, killer: Killer | None = None
) -> dict[str, Any]:
    """Run it; duration in seconds, commands given, processes by class, and where training went on from."""
    census = Census(nodes)
    census.start()
    began = time.monotonic()
    commands = run_command(arguments, layout, nodes.address, log, killer)
    seconds = time.monotonic() - began
    resumed = [record["step"] for record in read_metrics(layout.metrics) if record["event"] == "resume"]
    return {"seconds": seconds, "commands": commands, "processes": census.end(), "resumed_at_steps": resumed}


def stage_seconds(layout: RunLayout, stages: Sequence[str]) -> dict[str, float]:
    """How long stages took."""
    records = {name: layout.stages / f"{name}.json" for name in stages}
    return {name: json.loads(path.read_text())["seconds"] for name, path in records.items() if path.exists()}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both runs, compared."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        whole, quiet = undisturbed(arguments, folder)
        seconds = stage_seconds(whole, _DISTURBED)
        logger.info("undisturbed: %.0f s, by stage: %s", quiet["seconds"], seconds)
        hit, noisy = disturbed(arguments, folder, quiet["work"])
        noisy_seconds, evaluated = stage_seconds(hit, _DISTURBED), arguments.until == "evaluate"
        expected, found = (digests(layout, evaluated=evaluated) for layout in (whole, hit))
    same = {name: found[name] == expected[name] for name in expected}
    kinds = Counter((kill["stage"], kill["kind"]) for kill in noisy["kills"])
    extra = {
        kind: noisy["processes"].get(kind, 0) - quiet["processes"].get(kind, 0)
        for kind in sorted(noisy["processes"] | quiet["processes"])
    }
    return {
        "kills": len(noisy["kills"]),
        "kills_by_stage": {
            stage: {kind: kinds[stage, kind] for kind in ("node", "process", "driver")} for stage in seconds
        },
        "victims": dict(Counter("node" if kill["kind"] == "node" else kill["victim"] for kill in noisy["kills"])),
        "planned_kills": noisy["planned"],
        "restarts": {
            "commands": noisy["commands"] - 1,
            "training_from_checkpoint_at_steps": noisy["resumed_at_steps"],
            "processes_more_than_undisturbed": extra,
        },
        "undisturbed_s": round(quiet["seconds"], 1),
        "disturbed_s": round(noisy["seconds"], 1),
        "time_lost_s": round(noisy["seconds"] - quiet["seconds"], 1),
        "stage_s": {"undisturbed": seconds, "disturbed": noisy_seconds},
        "identical": all(same.values()),
        "identical_artefacts": same,
    }


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of who is hit (default 0)")
    parser.add_argument("--node-kills", type=int, default=1, help="in each stage (default 1)")
    parser.add_argument("--process-kills", type=int, default=2, help="in each stage (default 2)")
    parser.add_argument(
        "--driver-kills", type=int, default=0, help="in each stage, of the command, which is given again (default 0)"
    )
    parser.add_argument("--nodes", type=int, default=3, help="worker nodes (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="resources.workers (default 2)")
    parser.add_argument("--pause", type=float, default=4, help="fewest seconds until a new node comes (default 4)")
    parser.add_argument("--until", choices=("train", "evaluate"), default="evaluate", help="last stage")
    parser.add_argument("--timeout", type=float, default=60, help="minutes of a command (default 60)")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml", help="default: the demo")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/chaos"), help="of Ray; a short path")
    parser.add_argument("--keep", type=Path, help="directory for both runs and their logs; default: removed")
    parser.add_argument("overrides", nargs="*", help="of the configuration, as of `nexus-ray run`")
    arguments = parser.parse_args()
    with command_line():
        print_result(measure(arguments))


if __name__ == "__main__":
    main()
