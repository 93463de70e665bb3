"""Training checkpoints: tensors in safetensors, the rest in JSON; nothing is pickled.

A recovery checkpoint holds the trained parameters, the optimiser's moments, what else the loop has to remember, the
step and the random state; the data position and every schedule are functions of the step. The best weights are kept
alone, in the same form. A checkpoint names the SHA-256 of its tensors, so a damaged one is known before it is used.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nexus_ray.errors import ArtefactError, StorageError
from nexus_ray.storage import Place, atomic_directory, local_directory, sha256_file
from nexus_ray.training.optimiser import optimiser_tensors, restore_optimiser

_TENSORS = "state.safetensors"
_STATE = "state.json"
_PARAMETER, _EXTRA, _RANDOM = "parameter.", "extra.", "rng.cpu"


@dataclass(frozen=True)
class Snapshot:
    """A moment of a training in the memory of the host: copies that the next step leaves alone.

    Attributes:
        tensors: parameters, moments, other tensors and the random state, by name.
        state: JSON-serialisable rest; holds `step`, the number of finished optimiser steps.
    """

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def take_snapshot(
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Any],
    optimiser: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """Copy what a checkpoint holds.

    Args:
        parameters: trained parameters by name.
        state: JSON-serialisable rest; must hold `step`.
        optimiser: of exactly these parameters; without it the snapshot can be used, but not be continued from.
        extra: other tensors to keep, by name.
    """
    tensors: dict[str, Tensor] = {_RANDOM: torch.get_rng_state()}
    tensors |= {f"{_PARAMETER}{name}": parameter.detach() for name, parameter in parameters.items()}
    tensors |= {f"{_EXTRA}{name}": tensor for name, tensor in (extra or {}).items()}
    if optimiser is not None:
        tensors |= optimiser_tensors(optimiser, parameters)
    return Snapshot({name: _copy(tensor) for name, tensor in tensors.items()}, dict(state))


def _copy(tensor: Tensor) -> Tensor:
    """On the host, whole, and its own."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def write_snapshot(directory: Place, snapshot: Snapshot) -> None:
    """Write a checkpoint directory atomically; what stands there is replaced.

    Raises:
        StorageError: the file system or the object store refused; what stood there stays.
    """
    with atomic_directory(directory) as temporary:
        _save(dict(snapshot.tensors), temporary / _TENSORS)
        state = {**snapshot.state, "sha256": sha256_file(temporary / _TENSORS)}
        (temporary / _STATE).write_text(json.dumps(state, indent=2) + "\n")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors; safetensors reports what the operating system says in an exception of its own."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        raise OSError(int(found[1]) if found else errno.EIO, str(error)) from error


def read_state(directory: Place) -> dict[str, Any]:
    """The `state` of a checkpoint whose tensors are as they were written.

    Raises:
        ArtefactError: the checkpoint is missing or damaged.
        StorageError: the file system or the object store would not let it be read now.
    """
    return _read(directory)[0]


def _read(directory: Place) -> tuple[dict[str, Any], Path]:
    """The state, and the file of the tensors on this node."""
    try:
        local = local_directory(directory)
        state: dict[str, Any] = json.loads((local / _STATE).read_text())
        whole = state.pop("sha256") == sha256_file(local / _TENSORS)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, AttributeError) as error:
        raise _unreadable(directory, error) from error
    except OSError as error:
        raise StorageError(
            f"cannot read the checkpoint {directory}: {error.strerror or error}",
            "when the file system answers again, the same command continues",
        ) from error
    if not whole:
        raise _unreadable(directory, "its tensors are not the ones that were written")
    return state, local / _TENSORS


def load_checkpoint(
    directory: Place,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Restore parameters, optimiser and other tensors (when given) and the random state in place.

    Returns:
        the saved `state`.

    Raises:
        ArtefactError: the checkpoint is damaged or belongs to other parameters; nothing is changed then.
    """
    state, file = _read(directory)
    try:
        tensors = load_file(file)
    except Exception as error:  # safetensors raises its own types
        raise _unreadable(directory, error) from error
    wanted: dict[str, Tensor] = {f"{_PARAMETER}{name}": parameter for name, parameter in parameters.items()}
    wanted |= {f"{_EXTRA}{name}": tensor for name, tensor in (extra or {}).items()}
    _check(directory, wanted, tensors)
    if optimiser is not None:
        restore_optimiser(optimiser, parameters, tensors)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])
    torch.set_rng_state(tensors[_RANDOM])
    return state


def _check(directory: Place, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint that lacks a tensor or has it in another shape."""
    for name, tensor in wanted.items():
        if name not in found or found[name].shape != tensor.shape:
            kind = f"another shape {list(found[name].shape)} of" if name in found else "no"
            raise ArtefactError(
                f"checkpoint {directory} has {kind} {name.split('.', 1)[1]}", "it belongs to another configuration"
            )


def _unreadable(directory: Place, reason: object) -> ArtefactError:
    return ArtefactError(f"checkpoint {directory} cannot be read: {reason}", "delete it to start over")
