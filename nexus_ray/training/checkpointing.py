"""Training checkpoints: tensors in safetensors, the rest in JSON; nothing is pickled.

A checkpoint holds the trained parameters, the optimiser's moments, the step and the random state. The data
position and every schedule are functions of the step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nexus_ray.errors import ArtefactError
from nexus_ray.storage import atomic_directory

_TENSORS = "state.safetensors"
_STATE = "state.json"


def save_checkpoint(
    directory: Path,
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    state: dict[str, Any],
) -> None:
    """Write a checkpoint directory atomically.

    Args:
        directory: where; replaced when it exists.
        parameters: trained parameters by name.
        optimiser: an AdamW over exactly these parameters.
        state: JSON-serialisable rest; must hold `step`, the number of finished optimiser steps.
    """
    tensors: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser.{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    with atomic_directory(directory) as temporary:
        save_file(tensors, temporary / _TENSORS)
        (temporary / _STATE).write_text(json.dumps(state))


def load_checkpoint(
    directory: Path, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Restore parameters, optimiser (when given) and random state in place; return the saved `state`.

    Raises:
        ArtefactError: the checkpoint is damaged or belongs to other parameters.
    """
    try:
        tensors = load_file(directory / _TENSORS)
        state: dict[str, Any] = json.loads((directory / _STATE).read_text())
    except Exception as error:  # safetensors raises its own types
        raise ArtefactError(f"checkpoint {directory} cannot be read: {error}", "delete it to start over") from error
    for name, parameter in parameters.items():
        found = tensors.get(f"parameter.{name}")
        if found is None or found.shape != parameter.shape:
            kind = "no" if found is None else f"another shape {list(found.shape)} of"
            raise ArtefactError(f"checkpoint {directory} has {kind} {name}", "it belongs to another configuration")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            if optimiser is not None:
                _restore_moments(optimiser, parameter, name, tensors)
    torch.set_rng_state(tensors["rng.cpu"])
    return state


def _restore_moments(
    optimiser: torch.optim.Optimizer, parameter: nn.Parameter, name: str, tensors: dict[str, Tensor]
) -> None:
    for key in ("step", "exp_avg", "exp_avg_sq"):
        value = tensors.get(f"optimiser.{key}.{name}")
        if value is not None:
            optimiser.state[parameter][key] = value if key == "step" else value.to(parameter.device)
