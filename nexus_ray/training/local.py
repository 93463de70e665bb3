"""What training keeps for itself needs a local run directory so far."""

from __future__ import annotations

from pathlib import Path

from nexus_ray.errors import ConfigError
from nexus_ray.storage import Place, is_remote


def local_only(place: Place) -> Path:
    """The place, which must be on this machine's file system.

    Raises:
        ConfigError: it is a URI.
    """
    if is_remote(place):
        raise ConfigError(f"training cannot keep {place} in an object store", "set run.directory to a local path")
    return place
