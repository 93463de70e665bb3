"""What a remote base model takes of the disk of each node that loads it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from nexus_ray.checkpoints.node_cache import missing_bytes, spare_bytes
from nexus_ray.checkpoints.reader import checkpoint_bytes
from nexus_ray.storage import Place, cache_root, is_remote


@dataclass(frozen=True)
class BaseCache:
    """A base model in the cache of a node.

    Attributes:
        directory: of the cache, on this machine.
        size: bytes of its weights.
        missing: bytes that this machine would fetch.
        free: bytes of this machine's disk there.
    """

    directory: str
    size: int
    missing: int
    free: int

    @property
    def fits(self) -> bool:
        """Whether this machine's disk takes it."""
        return not self.missing or self.missing + spare_bytes(self.missing) <= self.free


def plan_base_cache(model: Place) -> BaseCache | None:
    """What a remote model will take; None for a local one, which is used where it is.

    Raises:
        ModelError: it is missing or damaged.
        StorageError: its store refused, or failed for minutes.
    """
    if not is_remote(model):
        return None
    there = directory = cache_root()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    return BaseCache(str(directory), checkpoint_bytes(model), missing_bytes(model), free)
