"""`lstsq`: a shared expert whose output approximates that of the routed mixture on calibration text.

Gate and up projections are copied from the most used expert of the layer, so that the neurons are ones the model
has learned. Down projection and bias are a ridge regression from these neurons' activations on the output of the
whole MoE block. One forward pass of the frozen base over one batch of the domain's calibration text is enough: a
layer is fitted and written as soon as its block has run. Memory is that of the base, one forward pass of the batch,
and two float64 matrices of [width, width] and [width, hidden].
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from nexus_ray.checkpoints.node_cache import local_model
from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.config import Config
from nexus_ray.conversion.averaging import mean_expert
from nexus_ray.conversion.least_squares import RidgeFit, RidgeSums
from nexus_ray.conversion.plan import ConversionPlan
from nexus_ray.conversion.width import resize
from nexus_ray.data.packing import Batch
from nexus_ray.errors import ArtefactError
from nexus_ray.families import ExpertWeights
from nexus_ray.modeling.loading import LoadedModel, activation, load_base
from nexus_ray.modeling.shared_expert import Activation
from nexus_ray.router.calibration import Calibration
from nexus_ray.router.candidates import CalibrationText
from nexus_ray.storage import Place

logger = logging.getLogger(__name__)
_TOKENS = 1024  # that are turned into features at once


def fit_layers(
    config: Config, plan: ConversionPlan, calibration: Place, emit: Callable[[int, ExpertWeights], None]
) -> list[float]:
    """Fit the shared expert of every layer; call `emit(layer, weights)` in layer order.

    Args:
        config: the run.
        plan: which expert each layer starts from.
        calibration: the run's calibration text.
        emit: takes each layer's weights.

    Returns:
        For each layer the share of the variance of the block's output that the shared expert reproduces.

    Raises:
        ArtefactError: the calibration text is missing or damaged.
        ModelError: the base is missing or damaged.
    """
    base = load_base(config.model)
    batch = calibration_batch(config, calibration)
    function = activation(base.family, base.config)
    generator = torch.Generator().manual_seed(config.run.seed)
    explained = []

    with CheckpointReader(local_model(config.model.path)) as reader:

        def fit(layer: int, inputs: Tensor, outputs: Tensor) -> None:
            weights = mean_expert(plan.family.expert_parts(reader, layer), plan.experts[layer])
            weights = resize(weights, plan.description.width, generator)
            fitted = fit_down(weights, function, inputs, outputs, config.convert.ridge)
            explained.append(fitted.explained)
            logger.info("layer %d: the fit explains %.1f %% of the output's variance", layer, 100 * fitted.explained)
            emit(layer, _with_down(weights, fitted))

        _run_blocks(base, batch, fit)
    return explained


def calibration_batch(config: Config, path: Place) -> Batch:
    """`convert.calibration_sequences` of the run's calibration text, at even distances in each domain source.

    Domain sources give equally many, and at least one each, however few are asked for. Text of sources that the
    configuration no longer has is passed over.

    Args:
        config: the run.
        path: of the calibration text that `collect` chose.

    Raises:
        ArtefactError: it is missing, damaged or holds no domain source.
    """
    sources = Calibration.load(path).sources
    known = config.data.sources
    domain = [text for name, text in sources.items() if name in known and known[name].role == "domain"]
    if not domain:
        raise ArtefactError(f"{path} holds no text of a domain source", "run `nexus-ray collect CONFIG` again")
    total = max(config.convert.calibration_sequences, len(domain))
    counts = np.diff(np.arange(len(domain) + 1) * total // len(domain)).tolist()
    chosen = [_spread(text, count).batch() for text, count in zip(domain, counts, strict=True)]
    return Batch(
        np.concatenate([batch.input_ids for batch in chosen]),
        np.concatenate([batch.num_tokens for batch in chosen]),
    )


def _spread(text: CalibrationText, count: int) -> CalibrationText:
    """`count` sequences at even distances, or all there are."""
    return text if len(text) <= count else text.take(np.arange(count) * len(text) // count)


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


@torch.no_grad()
def _run_blocks(base: LoadedModel, batch: Batch, visit: Callable[[int, Tensor, Tensor], None]) -> None:
    """Run the base without its head; call `visit(layer, inputs, outputs)`, [valid tokens, hidden] both."""
    valid = torch.from_numpy(batch.valid)

    def visiting(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor | tuple[Tensor, ...]], None]:
        def hook(_block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            routed = output[0] if isinstance(output, tuple) else output
            mask = valid.to(inputs[0].device)  # layers may be spread over several devices
            visit(layer, inputs[0][mask], routed.view_as(inputs[0])[mask])

        return hook

    blocks = base.family.moe_blocks(base.model)
    hooks = [block.register_forward_hook(visiting(layer)) for layer, block in enumerate(blocks)]
    input_ids = torch.from_numpy(batch.input_ids.astype(np.int64)).to(base.device)
    try:
        base.model.base_model(input_ids=input_ids, attention_mask=valid.long().to(base.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
