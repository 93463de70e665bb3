"""Matching the intermediate neurons of experts before averaging them.

The neurons of an MLP may be listed in any order without changing what it computes, so the same neuron of two experts
usually stands at two places, and a plain mean mixes unrelated ones. Here every expert is first permuted to agree as
far as possible with a reference expert: the permutation that maximises the sum of inner products of matched neurons,
found by the Hungarian algorithm (weight matching of Git Re-Basin, Ainsworth, Hayase & Srinivasa, arXiv 2209.04836).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nexus_ray.families import ExpertWeights


def neuron_similarity(left: ExpertWeights, right: ExpertWeights) -> Tensor:
    """[width, width] inner products of the neurons of two experts.

    A neuron is its gate row, up row and down column with both biases; entry (i, j) compares neuron i of `left` with
    neuron j of `right`.
    """
    gate_left, up_left = _gate_and_up(left)
    gate_right, up_right = _gate_and_up(right)
    return gate_left @ gate_right.T + up_left @ up_right.T + left.down.T @ right.down


def matching(reference: ExpertWeights, expert: ExpertWeights) -> Tensor:
    """[width] int64: which neuron of `expert` belongs to each neuron of `reference`."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    _, order = linear_sum_assignment(neuron_similarity(reference, expert).numpy(), maximize=True)
    return torch.as_tensor(order)


def permute(expert: ExpertWeights, order: Tensor) -> ExpertWeights:
    """The same function with the intermediate neurons in another order; neuron i is the old neuron `order[i]`."""
    both = torch.cat([order, order + expert.width])
    return ExpertWeights(expert.gate_up[both], expert.gate_up_bias[both], expert.down[:, order], expert.down_bias)


def aligned_mean(experts: Iterable[ExpertWeights]) -> ExpertWeights:
    """Mean of experts (at least one), each matched to the first; holds the first, the total and one more."""
    remaining = iter(experts)
    reference = next(remaining)
    total, count = _clone(reference), 1
    for expert in remaining:
        _add(total, permute(expert, matching(reference, expert)))
        count += 1
    for tensor in _tensors(total):
        tensor.div_(count)
    return total


def _gate_and_up(expert: ExpertWeights) -> tuple[Tensor, Tensor]:
    """[width, hidden + 1] gate rows and up rows, each with its bias as the last column."""
    gate, up = torch.cat([expert.gate_up, expert.gate_up_bias[:, None]], dim=1).chunk(2)
    return gate, up


def _tensors(expert: ExpertWeights) -> tuple[Tensor, ...]:
    return expert.gate_up, expert.gate_up_bias, expert.down, expert.down_bias


def _clone(expert: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(*(tensor.clone() for tensor in _tensors(expert)))


def _add(total: ExpertWeights, expert: ExpertWeights) -> None:
    for left, right in zip(_tensors(total), _tensors(expert), strict=True):
        left.add_(right)
