"""The optimiser: which parameters decay, learning rates by group, moments in 32 or 8 bits, saved and restored.

Trained parameters are float32 masters, so both kinds compute the update in float32. 8-bit moments (Dettmers et al.,
2022, arXiv:2110.02861) are those of bitsandbytes, which needs no compiler and keeps plain tensors on CPUs and GPUs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nexus_ray.config import OptimiserSection, RoutersSection
from nexus_ray.errors import ArtefactError, ConfigError
from nexus_ray.training.schedule import biases_are_frozen, learning_rates

Kind = Literal["weights", "undecayed", "router_weights", "router_biases"]

_ROUTERS = "routers."
_RATES: dict[str, str] = {
    "weights": "learning_rate",
    "undecayed": "learning_rate",
    "router_weights": "router_learning_rate",
    "router_biases": "router_bias_learning_rate",
}
_DECAYED = ("weights", "router_weights")
_SAVED = "optimiser."


def check_optimiser(section: OptimiserSection) -> None:
    """Refuse an optimiser that this environment lacks.

    Raises:
        ConfigError: 8-bit moments without their package.
    """
    if section.name == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "optimiser.name is adamw_8bit, but bitsandbytes is not installed",
            "pip install 'nexus-ray[low-bit]', or set optimiser.name to adamw",
        )


def build_optimiser(
    parameters: Mapping[str, nn.Parameter], section: OptimiserSection, routers: RoutersSection | None = None
) -> torch.optim.Optimizer:
    """AdamW over these parameters.

    Weight decay leaves biases, norms, scales and attention sinks alone. Parameters named `routers.` have learning
    rates of their own.

    Args:
        parameters: what is trained, by name.
        section: which AdamW.
        routers: which routers are trained; needed when any of the parameters is one's.

    Raises:
        ConfigError: see `check_optimiser`.
    """
    check_optimiser(section)
    members: dict[Kind, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        members.setdefault(_kind(name), []).append(parameter)
    assert routers is not None or not any(kind.startswith("router") for kind in members)
    groups = [
        {
            "params": group,
            "weight_decay": section.weight_decay if kind in _DECAYED else 0.0,
            "kind": kind,
            "routers": routers,
        }
        for kind, group in members.items()
    ]
    betas = (section.beta1, section.beta2)
    if section.name == "adamw":
        return torch.optim.AdamW(groups, lr=section.learning_rate, betas=betas)
    optimiser: torch.optim.Optimizer = _bitsandbytes().AdamW8bit(groups, lr=section.learning_rate, betas=betas)
    return optimiser


def set_learning_rates(
    optimiser: torch.optim.Optimizer, step: int, steps: int, section: OptimiserSection
) -> dict[str, float]:
    """Give every group the learning rate of a step (0-based) of `steps`, 0 where it is frozen; returns what to log."""
    logged: dict[str, float] = {}
    for group in optimiser.param_groups:
        rates = learning_rates(step, steps, section, group["routers"])
        group["lr"] = rates[_RATES[group["kind"]]]
        group["frozen"] = group["kind"] == "router_biases" and biases_are_frozen(step, steps, group["routers"])
        logged |= rates
    return logged


def is_frozen(group: Mapping[str, Any]) -> bool:
    """Whether a group stays as it is in the step whose learning rates are set: router biases from their freeze on."""
    return bool(group["frozen"])


def drop_frozen_gradients(optimiser: torch.optim.Optimizer) -> None:
    """Forget gradients of what is frozen: they count in no norm, and the optimiser passes over them."""
    for group in optimiser.param_groups:
        if is_frozen(group):
            for parameter in group["params"]:
                parameter.grad = None


def optimiser_tensors(optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state of every parameter as plain tensors named `optimiser.{key}.{name}`; zeros before the first step."""
    return {
        f"{_SAVED}{key}.{name}": torch.as_tensor(value).detach()
        for name, parameter in parameters.items()
        for key, value in (optimiser.state.get(parameter) or _fresh_state(optimiser, parameter)).items()
    }


def restore_optimiser(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Set the state of every parameter to what `optimiser_tensors` gave; other tensors are left alone.

    Raises:
        ArtefactError: the tensors lack part of a state, or are of another optimiser or of parameters of other
            shapes; nothing is changed then.
    """
    fresh = {name: _fresh_state(optimiser, parameter) for name, parameter in parameters.items()}
    wanted = {f"{_SAVED}{key}.{name}": value for name, state in fresh.items() for key, value in state.items()}
    _check(wanted, {name: tensor for name, tensor in tensors.items() if name.startswith(_SAVED)})
    for name, state in fresh.items():
        for key, value in state.items():
            saved = tensors[f"{_SAVED}{key}.{name}"]
            state[key] = value.copy_(saved) if isinstance(value, Tensor) else saved.item()
        optimiser.state[parameters[name]] = state


def _check(wanted: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Refuse saved states that are not exactly of the wanted names, shapes and types."""
    differing = sorted(wanted.keys() ^ found.keys())
    if differing:
        kind = "lacks" if differing[0] in wanted else "has"
        raise ArtefactError(
            f"the checkpoint {kind} {differing[0]}: its optimiser is not the one of this run",
            "set optimiser.name to what the run began with, or start over in another run.directory",
        )
    for name, value in wanted.items():
        expected = torch.as_tensor(value)
        if (found[name].shape, found[name].dtype) != (expected.shape, expected.dtype):
            raise ArtefactError(
                f"{name} is {found[name].dtype} {list(found[name].shape)} in the checkpoint, "
                f"but {expected.dtype} {list(expected.shape)} in this run",
                "it belongs to another configuration; start over in another run.directory",
            )


def _fresh_state(optimiser: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """What the optimiser holds of a parameter before its first step."""
    if isinstance(optimiser, torch.optim.AdamW):
        moments = {name: torch.zeros_like(parameter).detach() for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.tensor(0.0), **moments}
    kept = optimiser.state.pop(parameter, None)
    try:
        return _initialised(optimiser, parameter)
    finally:
        del optimiser.state[parameter]
        if kept is not None:
            optimiser.state[parameter] = kept


def _initialised(optimiser: Any, parameter: nn.Parameter) -> dict[str, Any]:
    """A state that bitsandbytes has just made; it leaves it in `optimiser.state`."""
    places = (
        (group, index, position)
        for index, group in enumerate(optimiser.param_groups)
        for position, member in enumerate(group["params"])
        if member is parameter
    )
    group, index, position = next(places)
    optimiser.init_state(group, parameter, index, position)
    return dict(optimiser.state[parameter])


def _kind(name: str) -> Kind:
    if name.startswith(_ROUTERS):
        return "router_biases" if name.endswith("bias") else "router_weights"
    undecayed = name.endswith(("bias", "sinks", "scale")) or "norm" in name
    return "undecayed" if undecayed else "weights"


def _bitsandbytes() -> Any:
    """Its optimisers; what it says about kernels for other uses is not shown."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    finally:
        logger.setLevel(level)
    return bitsandbytes.optim
