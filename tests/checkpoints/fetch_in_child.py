"""What child processes of tests do: a module that imports little, so that they start soon."""

from __future__ import annotations

import os
from typing import Any

from nexus_ray.checkpoints import fetching
from nexus_ray.checkpoints.node_cache import local_model
from nexus_ray.storage import place_of

PIECE_BYTES = 16_384


def fetch_model(uri: str, environment: dict[str, str], answer: Any = None) -> None:
    """Open a model through the node's cache and put the directory into a queue."""
    os.environ.update(environment)
    fetching.PIECE_BYTES = PIECE_BYTES
    directory = local_model(place_of(uri))
    if answer is not None:
        answer.put(str(directory))
