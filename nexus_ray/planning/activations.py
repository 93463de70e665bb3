"""Bytes that autograd keeps for backward, and what a layer and the losses need while they compute.

The frozen base saves only what carries a gradient to the shared experts below, so the first layer's attention and
routed experts save nothing, and no weight gradient's input is kept but the shared experts'. The formulas list what
each operation of transformers' eager GPT-OSS, of `PackedExperts` and of `SharedExpert` saves. `model.attention` changes
nothing here: masks that keep documents apart are as large as those that only keep padding out.
Legend: N tokens of a micro-batch (B sequences x T tokens), H hidden, A heads x head size, E experts, k experts a
token, I routed width, W shared width, V vocabulary, c bytes of the compute type.
"""

from __future__ import annotations

from dataclasses import dataclass

from nexus_ray.checkpoints.overlay import TrainedKind
from nexus_ray.planning.sizes import ModelSizes

_FLOAT32, _INDEX = 4, 8


@dataclass(frozen=True)
class Workload:
    """One forward pass on one device.

    Attributes:
        sequences: B.
        length: T, tokens.
        itemsize: c, bytes of the compute type.
        experts: `model.experts`, how the routed experts are computed.
        width: W of the shared experts.
        token_gate: they have a gate per token.
        learn_scale: their output scale is trained.
        routers: which parameters of the routers are trained.
        checkpointed: only each layer's input is kept for backward.
    """

    sequences: int
    length: int
    itemsize: int
    experts: str
    width: int
    token_gate: bool
    learn_scale: bool
    routers: TrainedKind = "none"
    checkpointed: bool = False

    @property
    def tokens(self) -> int:
        """N."""
        return self.sequences * self.length


def attention_scores(sizes: ModelSizes, work: Workload) -> int:
    """One [B, heads, T, T + 1] matrix of eager attention; the extra column is the sink."""
    return work.sequences * sizes.attention_heads * work.length * (work.length + 1) * work.itemsize


def attention_saved(sizes: ModelSizes, work: Workload) -> int:
    """Queries, repeated keys and values, probabilities, and the indices of the maxima."""
    indices = work.sequences * sizes.attention_heads * work.length * _INDEX
    return 3 * work.tokens * sizes.attention_size * work.itemsize + attention_scores(sizes, work) + indices


def norm_saved(sizes: ModelSizes, work: Workload) -> int:
    """RMSNorm's float32 input and reciprocal root mean square."""
    return work.tokens * (sizes.dimensions.hidden_size + 1) * _FLOAT32


def routing_saved(sizes: ModelSizes, work: Workload) -> int:
    """The selected experts, their weights, and the order of tokens by expert."""
    return work.tokens * sizes.dimensions.experts_per_token * (work.itemsize + 2 * _INDEX)


def routed_experts_saved(sizes: ModelSizes, work: Workload) -> int:
    """Nothing beyond the layer's input when packed: backward computes it again.

    Dequantised experts keep, for every (token, expert) pair, both projections, four results of the activation and the
    output; transformers' `eager` the weighted output too, and `batched_mm` a copy of the weights for every pair.
    """
    if work.experts == "packed":
        return 0
    hidden, inner = sizes.dimensions.hidden_size, sizes.dimensions.intermediate_size
    values = 6 * inner + hidden
    if work.experts == "eager":
        values += hidden
    if work.experts == "batched_mm":
        values += sizes.expert_parameters()
    return work.tokens * sizes.dimensions.experts_per_token * (values * work.itemsize + 3 * _INDEX)


def shared_expert_saved(sizes: ModelSizes, work: Workload, *, first: bool) -> int:
    """Input, both projections, five results of the activation, and the output where a gate multiplies it.

    Where the compute type is not float32, the cast weights are kept too; the first layer needs no gradient of its
    input, so it does not keep those of gate and up.
    """
    hidden, tokens = sizes.dimensions.hidden_size, work.tokens
    outputs = int(work.token_gate) + int(work.learn_scale)
    values = tokens * (hidden + 7 * work.width + outputs * hidden + int(work.token_gate))
    if work.itemsize != _FLOAT32:
        values += hidden * work.width * (1 if first else 3)
    return values * work.itemsize


def trained_routers_saved(sizes: ModelSizes, work: Workload) -> int:
    """What only trained routers need: the first layer's routing and outputs of dequantised experts, which their weights
    multiply, and each further layer's sum of base and difference.
    """
    if work.routers == "none":
        return 0
    dimensions, saved = sizes.dimensions, routing_saved(sizes, work)
    if work.experts != "packed":
        outputs = (2 if work.experts == "eager" else 1) * dimensions.hidden_size * work.itemsize
        order = 0 if work.experts == "batched_mm" else 3 * _INDEX
        saved += work.tokens * dimensions.experts_per_token * (outputs + order)
    sums = dimensions.layers - 1 if work.routers == "all" else 0
    return saved + sums * dimensions.experts * dimensions.hidden_size * work.itemsize


def router_logits(sizes: ModelSizes, work: Workload) -> int:
    """All layers' router logits as they are recorded, and stacked."""
    return 2 * work.tokens * sizes.dimensions.layers * sizes.dimensions.experts * work.itemsize


def saved_for_backward(sizes: ModelSizes, work: Workload) -> int:
    """Everything that is kept from a forward pass of the student until its backward pass, logits and losses aside."""
    layers, last = sizes.dimensions.layers, norm_saved(sizes, work)
    if work.checkpointed:
        return layers * _layer_input(sizes, work) + _masks(work) + last + router_logits(sizes, work) // 2
    first = shared_expert_saved(sizes, work, first=True)
    routers = trained_routers_saved(sizes, work) + router_logits(sizes, work)
    return first + (layers - 1) * layer_saved(sizes, work) + last + routers


def layer_saved(sizes: ModelSizes, work: Workload) -> int:
    """What a layer that is not checkpointed keeps until its backward pass."""
    return (
        attention_saved(sizes, work)
        + 2 * norm_saved(sizes, work)
        + routing_saved(sizes, work)
        + routed_experts_saved(sizes, work)
        + shared_expert_saved(sizes, work, first=False)
    )


def _layer_input(sizes: ModelSizes, work: Workload) -> int:
    """What a checkpointed layer keeps; packed experts keep the order of tokens by expert too."""
    order = sizes.dimensions.experts_per_token * _INDEX if work.experts == "packed" else 0
    return work.tokens * (sizes.dimensions.hidden_size * work.itemsize + order)


def _masks(work: Workload) -> int:
    """Of full and of sliding attention, [B, 1, T, T] each, with which checkpointed layers run again."""
    return 2 * work.tokens * work.length * work.itemsize


def layer_working(sizes: ModelSizes, work: Workload) -> int:
    """What the largest step of a layer needs while it runs, forward or backward."""
    return max(_attention_working(sizes, work), experts_working(sizes, work), _shared_working(sizes, work))


def _attention_working(sizes: ModelSizes, work: Workload) -> int:
    """Scores before and after the sink is joined, and shifted (forward); three gradients of them (backward)."""
    return 3 * attention_scores(sizes, work)


def experts_working(sizes: ModelSizes, work: Workload) -> int:
    """Packed: one unpacked expert and a float32 sum over experts. Dequantised: gradients of both projections."""
    hidden, inner = sizes.dimensions.hidden_size, sizes.dimensions.intermediate_size
    if work.experts == "packed":
        expert = sizes.expert_parameters() * work.itemsize if sizes.packed_bytes else 0
        return expert + work.tokens * hidden * (_FLOAT32 + work.itemsize)
    return work.tokens * sizes.dimensions.experts_per_token * (4 * inner + hidden) * work.itemsize


def _shared_working(sizes: ModelSizes, work: Workload) -> int:
    """Gradients of both projections and of the largest weight before it becomes float32."""
    weight = 2 * sizes.dimensions.hidden_size * work.width if work.itemsize != _FLOAT32 else 0
    return (4 * work.tokens * work.width + weight) * work.itemsize
