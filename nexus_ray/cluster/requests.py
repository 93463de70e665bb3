"""What a worker asks of Ray: the same request as the options of an actor and as the bundle of a placement group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nexus_ray.config import ResourcesSection

_ACCELERATOR = "accelerator_type:"
_COMMON = ("CPU", "GPU", "memory")
_ANY_AMOUNT = 0.001  # of the resource by which Ray marks nodes with a kind of accelerator


def actor_options(resources: ResourcesSection) -> dict[str, Any]:
    """Ray's resource request for one worker, as options of an actor or a task."""
    options: dict[str, Any] = {"num_cpus": resources.cpus_per_worker, "num_gpus": resources.gpus_per_worker}
    if resources.memory_gib_per_worker is not None:
        options["memory"] = int(resources.memory_gib_per_worker * 2**30)
    if resources.accelerator_type is not None:
        options["accelerator_type"] = resources.accelerator_type
    if resources.custom_per_worker:
        options["resources"] = dict(resources.custom_per_worker)
    return options


def bundle(resources: ResourcesSection) -> dict[str, float]:
    """The same request as nodes name it: `CPU`, `GPU`, `memory` (bytes), custom resources; nothing that is zero."""
    amounts: dict[str, float] = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    if resources.memory_gib_per_worker is not None:
        amounts["memory"] = int(resources.memory_gib_per_worker * 2**30)
    if resources.accelerator_type is not None:
        amounts[_ACCELERATOR + resources.accelerator_type] = _ANY_AMOUNT
    return {name: amount for name, amount in (amounts | resources.custom_per_worker).items() if amount}


def in_words(amounts: Mapping[str, float]) -> str:
    """A request, or what a node has, for people: `8 CPUs, 1 GPU (L40S), 1.5 GiB of memory, 1 spot`."""
    kinds = [name.removeprefix(_ACCELERATOR) for name in amounts if name.startswith(_ACCELERATOR)]
    words = []
    for name in ("CPU", "GPU"):
        if amount := amounts.get(name):
            words.append(f"{amount:g} {name}{'' if amount == 1 else 's'}")
    if kinds:
        words.append(f"{'' if 'GPU' in amounts else 'accelerator '}({', '.join(kinds)})")
    if memory := amounts.get("memory"):
        words.append(f"{memory / 2**30:.3g} GiB of memory")
    own = (name for name in amounts if name not in _COMMON and not name.startswith(_ACCELERATOR))
    return ", ".join([*words, *(f"{amounts[name]:g} {name}" for name in own)]).replace(", (", " (")


def set_worker_threads(resources: ResourcesSection) -> None:
    """Give torch as many threads as the worker has CPUs: results must not depend on the machine's core count."""
    import torch

    torch.set_num_threads(resources.cpus_per_worker)
