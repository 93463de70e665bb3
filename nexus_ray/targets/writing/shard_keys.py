"""Names of shards: a digest of everything that decides a shard's bytes, so that equal text is never done twice."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Self

from nexus_ray.config import ResourcesSection
from nexus_ray.data.shard_identity import text_identities
from nexus_ray.data.shard_sizes import estimate_tokens
from nexus_ray.data.sources import Shard, list_shards
from nexus_ray.storage import digest
from nexus_ray.targets.writing.job import PrecomputeJob

KEY_DIGITS = 16  # 64 bits: a million shards have a chance of 3e-8 that two of them share a key
_NAME_CHARACTERS = 64  # of a source in a file name
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")


@dataclass(frozen=True)
class ShardWork:
    """A shard of text that becomes a shard of targets.

    Attributes:
        shard: the text.
        key: digest of everything that decides the bytes, 16 hexadecimal digits.
        output: whether it gets next-token targets.
        router: whether it gets router targets.
        estimate: tokens, estimated from sizes of files and rather too few.
    """

    shard: Shard
    key: str
    output: bool
    router: bool
    estimate: float

    @property
    def name(self) -> str:
        """Of its file."""
        source = _UNSAFE.sub("_", self.shard.source)[:_NAME_CHARACTERS].lstrip(".") or "_"
        return f"{source}-{self.key}.parquet"

    @property
    def text(self) -> str:
        """Where the text is, for people."""
        return f"{self.shard.path} [{self.shard.start:,} to {self.shard.stop:,}]"

    def as_row(self) -> dict[str, Any]:
        """The work as a Ray Data row."""
        return asdict(self)

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Self:
        """The work of a row of `as_row`."""
        return cls(Shard(**row["shard"]), row["key"], row["output"], row["router"], row["estimate"])


def plan_work(job: PrecomputeJob, resources: ResourcesSection) -> list[ShardWork]:
    """All shards of a job, in the order of the text.

    Raises:
        DataError: a source is missing or unreadable.
    """
    shards = list_shards(job.data, "train", job.names)
    recipe = {"header": job.header.model_dump(mode="json")}
    seen: Counter[str] = Counter()
    work = []
    for shard, text, estimate in zip(shards, text_identities(shards), estimate_tokens(shards).tolist(), strict=True):
        output, router = shard.source in job.output_sources, shard.source in job.router_sources
        of_source = {"source": shard.source, "output": output, "router": router}
        predict = job.data.sources[shard.source].predict
        if predict != "all":
            of_source["predict"] = predict
        computed = _computation(job, resources) if output or router else {}
        identity = digest({**recipe, **of_source, **computed, "text": text})
        key = digest([identity, seen[identity]])[:KEY_DIGITS]
        seen[identity] += 1
        work.append(ShardWork(shard, key, output, router, estimate))
    return work


def _computation(job: PrecomputeJob, resources: ResourcesSection) -> dict[str, Any]:
    """What decides the bytes of the targets, the header and the text aside."""
    draws = job.header.output is not None and job.header.output.mode == "sampled"
    return {
        "batch_sequences": job.batch_sequences,
        "threads": resources.cpus_per_worker,
        "seed": job.seed if draws else None,
    }
