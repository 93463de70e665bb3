"""What a run does once a shard, a file, a step or a validation, in one process, whatever the number of GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from nexus_ray.planning.scale import figures
from nexus_ray.planning.scale.learning import train
from nexus_ray.planning.scale.run import PlannedRun
from nexus_ray.planning.scale.teaching import precompute
from nexus_ray.targets.reading.reader import AT_ONCE

_HASHES = 3  # of the text: two recipes of `collect`, names of shards in `precompute`


@dataclass(frozen=True)
class Bottleneck:
    """One of them.

    Attributes:
        what: in words.
        where: in the code.
        seconds: that it takes in a run.
    """

    what: str
    where: str
    seconds: Callable[[PlannedRun], float]


def _training_part(name: str) -> Callable[[PlannedRun], float]:
    return lambda run: next(part.seconds for part in train(run).parts if part.name == name)


def _teaching_part(name: str) -> Callable[[PlannedRun], float]:
    return lambda run: next(part.seconds for part in precompute(run).parts if part.name == name)


BOTTLENECKS = (
    Bottleneck(
        "every worker shuffles each source once an epoch, and keeps the order",
        "`training/feeding/order.py`",
        _training_part("order of sequences"),
    ),
    Bottleneck(
        "rank 0 writes best weights while all others wait, one validation in a hundred steps",
        "`training/loop.py`",
        _training_part("best weights"),
    ),
    Bottleneck(
        "recovery checkpoints of rank 0: copies, waiting for the one before, the last write",
        "`training/recovery.py`",
        _training_part("checkpoints"),
    ),
    Bottleneck("gradients, nothing of it hidden", "DDP", _training_part("gradients reduced")),
    Bottleneck(
        "the driver hashes all local text, three times a run (text in a store is not hashed)",
        "`data/sources.py`, `data/shard_identity.py`",
        lambda run: _HASHES * run.text_bytes / figures.HASH,
    ),
    Bottleneck(
        "the driver hands every shard to the pool as a block of its own",
        "`cluster.py`",
        _teaching_part("shards handed out"),
    ),
    Bottleneck(
        "the driver reads every shard's record and writes them all into one manifest",
        "`targets/writing/`",
        _teaching_part("records and manifest"),
    ),
    Bottleneck(
        "records of shards in an object store, a request each, one after the other",
        "`targets/writing/shard_store.py`",
        lambda run: run.shards * figures.STORE_REQUEST,
    ),
    Bottleneck(
        "every worker of `train` opens the whole manifest", "`targets/reading/`", _training_part("targets opened")
    ),
    Bottleneck(
        f"footers of a step's shards, {AT_ONCE} at a time, from an object store",
        "`targets/reading/reader.py`",
        lambda run: _footers(run) * figures.STORE_REQUEST,
    ),
)


def _footers(run: PlannedRun) -> float:
    """Rounds of requests for the shards whose rows a worker counts.

    They are those of all sequences of every step; few of them were seen shortly before.
    """
    sequences = sum(run.config.sequences_per_step().values())
    shards = run.shards
    a_step = shards * (1 - (1 - 1 / shards) ** sequences)
    kept = min(1.0, _OPEN_SHARDS / shards)
    return run.config.train.steps * ceil(a_step * (1 - kept) / AT_ONCE)


_OPEN_SHARDS = 64  # whose footers a worker keeps (`targets/reading/reader.py`)
