"""From a run's configuration to what it serves: the base loaded once, and its overlays by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nexus_ray.checkpoints.overlay import CONFIG_FILE
from nexus_ray.config import Config
from nexus_ray.errors import ArtefactError, ConfigError
from nexus_ray.generation.assistant import Assistant
from nexus_ray.generation.batching.engine import BatchingEngine
from nexus_ray.generation.batching.paged import BatchLimits
from nexus_ray.generation.codec import Codec
from nexus_ray.generation.request import BASE
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import load_base
from nexus_ray.storage import Place, exists, member


def student_name(config: Config) -> str:
    """The student's model id: `serve.name`, else the run directory's name.

    Raises:
        ConfigError: it is the base's.
    """
    name = config.serve.name or config.run.directory.resolve().name
    if not name or name == BASE:
        raise ConfigError(f"the student's model id cannot be {name!r}", "choose another with serve.name=NAME")
    return name


def overlays_of(config: Config) -> dict[str, Place]:
    """The run's trained overlay and those of `serve.overlays`, by model id.

    Raises:
        ConfigError: two have the same name, or one has the base's.
        ArtefactError: one is not there.
    """
    overlays = {student_name(config): RunLayout(config.run.directory).overlay}
    for name, path in config.serve.overlays.items():
        if name == BASE or name in overlays:
            raise ConfigError(f"serve.overlays: the model id {name!r} is taken", "choose another name")
        overlays[name] = path
    require_overlays(overlays)
    return overlays


def require_overlays(overlays: Mapping[str, Place]) -> None:
    """Check that overlays are there.

    Raises:
        ArtefactError: one is not.
    """
    for name, path in overlays.items():
        if not exists(member(path, CONFIG_FILE)):
            raise ArtefactError(f"no trained overlay at {path}, for model {name!r}", "run `nexus-ray run CONFIG` first")


def one_device() -> list[torch.device] | None:
    """The first GPU that this process sees: transformers' paged cache lies on one device. None without any."""
    return [torch.device("cuda", 0)] if torch.cuda.is_available() else None


def load_assistant(config: Config, overlays: Mapping[str, Place]) -> Assistant:
    """Load the base and overlays of a run, ready to answer.

    Raises:
        ModelError: the base cannot be loaded.
        ArtefactError: an overlay is missing, damaged or belongs to another base.
    """
    require_overlays(overlays)
    base = load_base(config.model, one_device())
    serve = config.serve
    limits = BatchLimits(
        requests=serve.max_concurrent_requests,
        batch_requests=serve.batch_requests,
        batch_tokens=serve.batch_tokens,
        window_tokens=serve.window_tokens,
        cache_tokens=serve.cache_tokens,
        stuck_seconds=serve.stuck_seconds,
    )
    return Assistant(BatchingEngine(base, overlays, limits), Codec.of(base), serve.max_new_tokens)
