"""Where a node keeps copies of what lives elsewhere: one directory for all, which may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

VARIABLE = "NEXUS_RAY_CACHE"


def cache_root() -> Path:
    """The directory that NEXUS_RAY_CACHE names, else `nexus-ray` in the user's cache directory; need not exist yet."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("nexus-ray"))
