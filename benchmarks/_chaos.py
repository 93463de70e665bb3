"""Ending nodes and workers of a run at random moments."""

from __future__ import annotations

import logging
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
from _chaos_nodes import WORKERS, Nodes

from nexus_ray.config import STAGES
from nexus_ray.layout import RunLayout
from nexus_ray.training.watching.metrics import read_metrics

logger = logging.getLogger("nexus_ray.chaos")


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        stage: in which it happens.
        kind: "node", "process" or "driver".
        share: of the stage's work that must be done before.
        pause: seconds from then on.
    """

    stage: str
    kind: str
    share: float
    pause: float


def draw_kills(stages: Sequence[str], counts: Mapping[str, int], choose: random.Random) -> list[Kill]:
    """So many kills of each kind at random moments within each stage, in their order."""
    kills = []
    for stage in stages:
        kinds = [kind for kind, count in counts.items() for _ in range(count)]
        kills += [Kill(stage, kind, choose.uniform(0, 0.8), choose.uniform(0, 3)) for kind in kinds]
    return sorted(kills, key=lambda kill: (STAGES.index(kill.stage), kill.share))


def stage_now(layout: RunLayout) -> str | None:
    """The stage that is being done."""
    for name in STAGES:
        if (layout.stages / f"{name}.started.json").exists():
            return name
    return None


def work_done(layout: RunLayout, stage: str) -> int:
    """How much of a stage is done: units of statistics, shards of targets, steps; of an evaluation nobody can tell."""
    if stage == "collect":
        return len(list(layout.directory.glob("router_stats.partial/unit-*.safetensors")))
    if stage == "precompute":
        return len(list(layout.targets.glob("*.parquet")))
    if stage == "train":
        return max((int(record["step"]) + 1 for record in read_metrics(layout.metrics)), default=0)
    return 0


class Progress(threading.Thread):
    """Notes the most that was done of each stage.

    Args:
        layout: of the run.
    """

    def __init__(self, layout: RunLayout) -> None:
        super().__init__(daemon=True)
        self.most: dict[str, int] = {}
        self._layout = layout
        self._ended = threading.Event()

    def run(self) -> None:
        """Look now and then."""
        while not self._ended.wait(0.1):
            stage = stage_now(self._layout)
            if stage is not None:
                self.most[stage] = max(self.most.get(stage, 0), work_done(self._layout, stage))

    def end(self) -> dict[str, int]:
        """Stop; the most of each stage."""
        self._ended.set()
        self.join()
        return self.most


@dataclass
class Killer(threading.Thread):
    """Ends nodes and processes as planned, and puts a new node in a lost one's place after a while.

    Attributes:
        nodes: the cluster.
        layout: of the run.
        kills: what is to be done, in order.
        work: how much there is to do in each stage.
        choose: who is hit, and when a new node comes.
        pause: seconds until a new node comes, fewest and most.
        driver: the process of the command, once it runs.
        done: what has been done: stage, kind, what was hit.
    """

    nodes: Nodes
    layout: RunLayout
    kills: Sequence[Kill]
    work: Mapping[str, int]
    choose: random.Random
    pause: tuple[float, float]
    driver: subprocess.Popen[bytes] | None = None
    done: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._ended = threading.Event()
        self._coming: list[threading.Thread] = []

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        """Do what is planned, each as soon as so much of its stage is done."""
        waiting = list(self.kills)
        while waiting and not self._ended.wait(0.02):
            kill, stage = waiting[0], stage_now(self.layout)
            if stage is None or STAGES.index(stage) < STAGES.index(kill.stage):
                continue
            if stage != kill.stage:  # it ended before
                logger.warning("%s: ended before the %s was killed", kill.stage, kill.kind)
                waiting.pop(0)
            elif work_done(self.layout, stage) >= kill.share * self.work.get(stage, 0):
                self._ended.wait(kill.pause)
                if stage_now(self.layout) == stage and (victim := self._kill(kill.kind)) is not None:
                    waiting.pop(0)
                    self._note(kill, victim)

    def _kill(self, kind: str) -> str | None:
        return {"node": self._node, "process": self._process, "driver": self._driver}[kind]()

    def end(self) -> None:
        """Stop, after new nodes that are on their way have come."""
        self._ended.set()
        self.join()
        for thread in self._coming:
            thread.join()

    def _note(self, kill: Kill, victim: str) -> None:
        done, work = work_done(self.layout, kill.stage), self.work.get(kill.stage, 0)
        self.done.append({"stage": kill.stage, "kind": kill.kind, "victim": victim})
        logger.info("%s: killed %s %s when %d of %d were done", kill.stage, kill.kind, victim, done, work)

    def _node(self) -> str | None:
        victim = self.nodes.kill_one(self.choose)
        if victim is not None:
            self._later(self.choose.uniform(*self.pause), self.nodes.add)
        return victim

    def _process(self) -> str | None:
        """End a worker of the stage, any of them."""
        workers = sorted(
            ((kind, process) for kind, process in self.nodes.actors() if kind in WORKERS), key=lambda one: one[1].pid
        )
        if not workers:
            return None
        kind, process = self.choose.choice(workers)
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.Error:
            return None
        return kind

    def _driver(self) -> str | None:
        """End the command itself."""
        if self.driver is None or self.driver.poll() is not None:
            return None
        self.driver.kill()
        return "driver"

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        def wait_and_act() -> None:
            self._ended.wait(seconds)
            act()

        thread = threading.Thread(target=wait_and_act, daemon=True)
        thread.start()
        self._coming.append(thread)
