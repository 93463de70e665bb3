"""Giving an expert another number of intermediate neurons."""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_ray.families import ExpertWeights

RANDOM_STD = 0.02


def resize(expert: ExpertWeights, width: int, generator: torch.Generator) -> ExpertWeights:
    """An expert of `width` neurons: the most important ones of a wider expert, or a narrower one and idle neurons."""
    if width == expert.width:
        return expert
    if width < expert.width:
        return keep_neurons(expert, most_important(expert, width))
    return add_neurons(expert, width - expert.width, generator)


def most_important(expert: ExpertWeights, count: int) -> Tensor:
    """[count] neurons with the largest ||down column|| * ||[gate row, up row]||, in their own order."""
    gate, up = expert.gate_up.chunk(2)
    inputs = (gate.square().sum(dim=1) + up.square().sum(dim=1)).sqrt()
    importance = expert.down.norm(dim=0) * inputs
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def keep_neurons(expert: ExpertWeights, neurons: Tensor) -> ExpertWeights:
    """Only the intermediate neurons with these numbers."""
    rows = torch.cat([neurons, neurons + expert.width])
    return ExpertWeights(expert.gate_up[rows], expert.gate_up_bias[rows], expert.down[:, neurons], expert.down_bias)


def add_neurons(expert: ExpertWeights, count: int, generator: torch.Generator) -> ExpertWeights:
    """The same function with `count` more neurons: small random inputs, so that they can learn, and no output."""
    hidden = expert.gate_up.shape[1]
    gate, up = expert.gate_up.chunk(2)
    gate_bias, up_bias = expert.gate_up_bias.chunk(2)
    fresh_gate, fresh_up = (torch.randn(2, count, hidden, generator=generator) * RANDOM_STD).unbind()
    silent = torch.zeros(count)
    return ExpertWeights(
        torch.cat([gate, fresh_gate, up, fresh_up]),
        torch.cat([gate_bias, silent, up_bias, silent]),
        torch.cat([expert.down, torch.zeros(hidden, count)], dim=1),
        expert.down_bias,
    )


def random_expert(hidden_size: int, width: int, generator: torch.Generator) -> ExpertWeights:
    """A small random expert: normal weights of standard deviation 0.02, zero biases."""
    return ExpertWeights(
        torch.randn(2 * width, hidden_size, generator=generator) * RANDOM_STD,
        torch.zeros(2 * width),
        torch.randn(hidden_size, width, generator=generator) * RANDOM_STD,
        torch.zeros(hidden_size),
    )
