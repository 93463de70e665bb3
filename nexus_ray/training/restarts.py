"""What ended an attempt at a training, and whether there is another one.

A node that was taken away says nothing about the code: it does not count. A worker that died may have been hit by
accident, or dies of its own doing each time: it counts as long as no new checkpoint shows that the training gets on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from nexus_ray.cluster.deaths import OUT_OF_MEMORY_HINT, is_out_of_memory, is_preemption
from nexus_ray.errors import NexusError

logger = logging.getLogger(__name__)
MOST_LOST_IN_A_ROW = 20  # nodes without a checkpoint between them: steps that never end are no progress
Cause = Literal["node", "memory", "worker", "place"]
_CONTINUES = "the same command continues from the last checkpoint"


@dataclass
class Attempts:
    """The attempts at one training.

    Attributes:
        max_failures: workers that may die one after the other without a new checkpoint between them.
        max_wait_minutes: how long it may wait for a place for its workers.
    """

    max_failures: int
    max_wait_minutes: float
    _reached: int = 0
    _since: dict[Cause, int] = field(default_factory=dict)
    _waiting_since: float | None = None

    def after(self, error: Exception, lost: Collection[str], reached: int) -> None:
        """Return when it is to be tried again.

        Args:
            error: what ended the attempt.
            lost: nodes that went away while it was going on.
            reached: steps of the newest checkpoint.

        Raises:
            NexusError: it is not.
        """
        if reached > self._reached:
            self._reached, self._since, self._waiting_since = reached, {}, None
        cause = cause_of(error, lost)
        if cause == "place":
            self._wait(error)
            return
        self._waiting_since = None
        self._since[cause] = self._since.get(cause, 0) + 1
        if cause == "node":
            self._lost(lost, error)
            return
        failures = self._since.get("worker", 0) + self._since.get("memory", 0)
        if failures > self.max_failures:
            raise self._given_up(cause, error, failures) from error
        why = "ran out of memory" if cause == "memory" else "failed"
        logger.warning(
            "a training worker %s (%d of at most %d times without a new checkpoint): training goes on from step %d",
            why, failures, self.max_failures, reached,
        )  # fmt: skip

    def _wait(self, error: Exception) -> None:
        """Ask for the same places again, for so long."""
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        if now - self._waiting_since >= self.max_wait_minutes * 60:
            raise NexusError(
                f"training failed: for {self.max_wait_minutes:g} minutes there was no place for its workers",
                "look who else uses the cluster (`ray status`), ask for less with `resources`, or raise "
                f"resources.max_wait_minutes; {_CONTINUES}",
            ) from error
        logger.warning("training waits for a place for its workers: others have it, or it is yet to come")

    def _lost(self, lost: Collection[str], error: Exception) -> None:
        """Say which nodes went away; refuse to go on when that is all that happens."""
        if self._since["node"] > MOST_LOST_IN_A_ROW:
            raise NexusError(
                f"training lost a node {self._since['node']} times in a row without a new checkpoint",
                f"lower train.checkpoint_every, or use nodes that stay longer; {_CONTINUES}",
            ) from error
        names = ", ".join(sorted(node[:12] for node in lost)) or "it was to be taken away"
        logger.warning("training lost a node (%s): it goes on from step %d on others", names, self._reached)

    def _given_up(self, cause: Cause, error: Exception, failures: int) -> NexusError:
        if cause == "memory":
            return NexusError(
                f"training failed: a worker ran out of memory; {failures} failures in a row without a new checkpoint",
                f"{OUT_OF_MEMORY_HINT}; or lower train.micro_batch_sequences; {_CONTINUES}",
            )
        return NexusError(
            f"training failed: {error}", "run the same command again: it continues from the last checkpoint"
        )


def cause_of(error: Exception, lost: Collection[str]) -> Cause:
    """What ended an attempt; the workers that are left fail too when one goes away, each in its own way."""
    if lost or is_preemption(error):
        return "node"
    if "WorkerGroupStartupTimeoutError" in _names(error):
        return "place"
    return "memory" if is_out_of_memory(error) else "worker"


def _names(error: BaseException) -> list[str]:
    """Of an error's class, and of that of the failure that it tells of: Ray's controller wraps its own."""
    inner = getattr(error, "controller_failure", None)
    return [type(error).__name__, *([type(inner).__name__] if inner is not None else [])]
