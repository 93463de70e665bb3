"""`lstsq`: a shared expert whose output approximates that of the routed mixture on calibration text.

Gate and up projections are copied from the most used expert of the layer, so that the neurons are ones the model
has learned. Down projection and bias are a ridge regression from these neurons' activations on the output of the
whole MoE block. One forward pass of the frozen base over one batch of the domain's training text is enough: a layer is
fitted and written as soon as its block has run. Memory is that of the base, one forward pass of the batch, and two
float64 matrices of [width, width] and [width, hidden].
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.config import Config
from nexus_ray.conversion.averaging import mean_expert
from nexus_ray.conversion.least_squares import RidgeFit, RidgeSums
from nexus_ray.conversion.plan import ConversionPlan
from nexus_ray.conversion.width import resize
from nexus_ray.data.packing import Batch, PackedSequence, batches, pack_shard
from nexus_ray.data.sources import list_shards
from nexus_ray.errors import DataError
from nexus_ray.families import ExpertWeights
from nexus_ray.modeling.loading import LoadedModel, activation, load_base
from nexus_ray.modeling.shared_expert import Activation

logger = logging.getLogger(__name__)
_TOKENS = 1024  # that are turned into features at once


def fit_layers(config: Config, plan: ConversionPlan, emit: Callable[[int, ExpertWeights], None]) -> list[float]:
    """Fit the shared expert of every layer; call `emit(layer, weights)` in layer order.

    Returns:
        For each layer the share of the variance of the block's output that the shared expert reproduces.

    Raises:
        DataError: the domain's training text holds no token.
        ModelError: the base is missing or damaged.
    """
    base = load_base(config.model)
    batch = calibration_batch(config, base)
    function = activation(base.family, base.config)
    generator = torch.Generator().manual_seed(config.run.seed)
    explained = []

    with CheckpointReader(config.model.path) as reader:

        def fit(layer: int, inputs: Tensor, outputs: Tensor) -> None:
            weights = mean_expert(plan.family.expert_parts(reader, layer), plan.experts[layer])
            weights = resize(weights, plan.description.width, generator)
            fitted = fit_down(weights, function, inputs, outputs, config.convert.ridge)
            explained.append(fitted.explained)
            logger.info("layer %d: the fit explains %.1f %% of the output's variance", layer, 100 * fitted.explained)
            emit(layer, _with_down(weights, fitted))

        _run_blocks(base, batch, fit)
    return explained


def calibration_batch(config: Config, base: LoadedModel) -> Batch:
    """`convert.calibration_sequences` training sequences, spread evenly over the domain sources and their shards.

    Raises:
        DataError: there is no text.
    """
    domain = [name for name, source in config.data.sources.items() if source.role == "domain"]
    each = math.ceil(config.convert.calibration_sequences / len(domain))
    by_source = [_sequences(config, base, name, each) for name in domain]
    chosen = [sequence for group in by_source for sequence in group][: config.convert.calibration_sequences]
    if not chosen:
        raise DataError(f"no calibration text in the domain sources {', '.join(domain)}", "add text to data.sources")
    return next(batches(chosen, len(chosen)))


def fit_down(expert: ExpertWeights, function: Activation, inputs: Tensor, outputs: Tensor, ridge: float) -> RidgeFit:
    """Regress `outputs` [tokens, hidden] on the expert's activations for `inputs` [tokens, hidden].

    Args:
        expert: its gate and up projections make the features.
        function: activation on (gate, up).
        inputs: hidden states that enter the MoE block.
        outputs: what the block makes of them.
        ridge: penalty as a share of the features' mean variance.
    """
    device = inputs.device
    weight, bias = expert.gate_up.to(device), expert.gate_up_bias.to(device)
    sums = RidgeSums(expert.width, outputs.shape[1], device)
    for start in range(0, len(inputs), _TOKENS):
        rows = slice(start, start + _TOKENS)
        gate, up = torch.addmm(bias, inputs[rows].float(), weight.T).chunk(2, dim=-1)
        sums.add(function(gate, up), outputs[rows])
    return sums.solve(ridge)


def _with_down(expert: ExpertWeights, fit: RidgeFit) -> ExpertWeights:
    return ExpertWeights(expert.gate_up, expert.gate_up_bias, fit.weight.float().cpu(), fit.bias.float().cpu())


def _sequences(config: Config, base: LoadedModel, source: str, count: int) -> Sequence[PackedSequence]:
    """The first sequences of evenly spaced shards of a source, `count` in all where it has as many."""
    shards = list_shards(config.data, "train", (source,))
    spread = [shards[number * len(shards) // count] for number in range(count)] if len(shards) > count else shards
    each = math.ceil(count / len(spread))
    length = config.data.sequence_length
    chosen = [list(islice(pack_shard(shard, base.tokenizer, length), each)) for shard in spread]
    return [sequence for group in chosen for sequence in group][:count]


@torch.no_grad()
def _run_blocks(base: LoadedModel, batch: Batch, visit: Callable[[int, Tensor, Tensor], None]) -> None:
    """Run the base without its head; call `visit(layer, inputs, outputs)`, [valid tokens, hidden] both."""
    valid = torch.from_numpy(batch.valid).to(base.device)

    def visiting(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor | tuple[Tensor, ...]], None]:
        def hook(_block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            routed = output[0] if isinstance(output, tuple) else output
            visit(layer, inputs[0][valid], routed.view_as(inputs[0])[valid])

        return hook

    blocks = base.family.moe_blocks(base.model)
    hooks = [block.register_forward_hook(visiting(layer)) for layer, block in enumerate(blocks)]
    input_ids = torch.from_numpy(batch.input_ids.astype(np.int64)).to(base.device)
    try:
        base.model.base_model(input_ids=input_ids, attention_mask=valid.long(), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
