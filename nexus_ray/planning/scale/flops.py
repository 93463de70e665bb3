"""Floating-point operations of a student's token: forward, and backward through frozen weights.

Frozen weights need the gradient of their input alone, so a product costs as much backward as forward; a trained one
costs twice that. Attention scores have two products whose both factors carry gradients. Nothing below the first shared
expert needs a gradient: the first layer's base has no backward pass. Element-wise steps are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.teacher_time import flop_per_token, head_flop


@dataclass(frozen=True)
class TokenFlop:
    """Operations of one token, two for a multiplication with its addition.

    Attributes:
        base: forward through the base's layers.
        student: forward through the layers with their shared experts.
        head: the LM head.
        backward: of the student's layers; the head's gradient costs `head` once more.
    """

    base: int
    student: int
    head: int
    backward: int


def token_flop(sizes: ModelSizes, length: int, width: int, *, packed: bool = True) -> TokenFlop:
    """Operations of a token.

    Args:
        sizes: of the base.
        length: tokens of a sequence; eager attention computes all of its scores.
        width: of the shared experts.
        packed: whether experts are `PackedExperts`, which keep nothing and compute gate and up again.
    """
    dimensions = sizes.dimensions
    base = flop_per_token(sizes, length, head=False)
    scores = 4 * dimensions.layers * sizes.attention_size * length
    shared = 6 * dimensions.layers * dimensions.hidden_size * width
    below = (base + scores) // dimensions.layers  # of the first layer: no gradient goes on from there
    first = 4 * dimensions.hidden_size * width  # the gradient of the first shared expert's input
    gate_up = 4 * dimensions.experts_per_token * sizes.expert_parameters() // 3
    again = packed * (dimensions.layers - 1) * gate_up
    return TokenFlop(base, base + shared, head_flop(sizes), base + scores - below + again + 2 * shared - first)
