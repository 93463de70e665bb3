"""From router logits to moments: one batch at a time, products in float32, sums in float64.

A batch is centred on its own mean before it is multiplied, so that float32 products lose nothing that matters; what
is added up over many tokens is float64. `benchmarks/router_moments.py` measures the error and the speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_ray.errors import DataError
from nexus_ray.modeling.packed_experts import ExpertNorms
from nexus_ray.router.moments import HALVES, RouterMoments, pack_symmetric

_ROWS = 2048  # tokens in one float32 product; its rounding errors grow with them


def moments_of_logits(
    router_logits: Tensor,
    valid: NDArray[np.bool_],
    half: NDArray[np.integer],
    experts_per_token: int,
    expert_norms: Sequence[ExpertNorms] = (),
    names: Sequence[str] = (),
) -> RouterMoments:
    """Moments of one batch, computed on the logits' device.

    Args:
        router_logits: [sequences, length, layers, experts] logits over all experts.
        valid: [sequences, length] false on padding, which is not counted and may hold anything.
        half: [sequences] 0 or 1, the half each sequence belongs to.
        experts_per_token: how many experts the router selects.
        expert_norms: what each layer's experts gave to the sequences * length tokens, padding included; empty
            where it was not recorded.
        names: of the sequences, for messages; default: their numbers.

    Raises:
        DataError: a logit or output of a valid token is NaN or infinite; names the first layer where one is, which
            is where the others come from, and its first sequence.
    """
    mask = torch.as_tensor(valid, device=router_logits.device)
    _check_finite(router_logits, expert_norms, mask, names)
    side = torch.as_tensor(half, device=router_logits.device)
    parts = [
        _part_moments(router_logits, mask & (side == part)[:, None], experts_per_token, expert_norms)
        for part in range(HALVES)
    ]
    count = torch.stack([(mask & (side == part)[:, None]).sum() for part in range(HALVES)]).cpu().numpy()
    mean, m2, together, gate_mass, reap = (np.stack([part[field] for part in parts]) for field in range(5))
    return RouterMoments(count, mean, m2, together.astype(np.int64), gate_mass, reap)


def comoments(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and co-moment matrix of rows: products in float32, sums in float64.

    With c the mean rounded to float32 and d the mean of p - c, the co-moment is
    sum (p - c)(p - c)^T - n d d^T: what rounding the mean shifts is taken back.

    Args:
        probabilities: [n, experts] float32; n may be 0.

    Returns:
        mean [experts] and m2 [experts, experts], float64.
    """
    size = max(len(probabilities), 1)
    centre = _column_sums(probabilities).div(size).float()
    shift = torch.zeros_like(centre, dtype=torch.float64)
    m2 = torch.zeros(len(centre), len(centre), dtype=torch.float64, device=centre.device)
    for rows in probabilities.split(_ROWS) if len(probabilities) else ():
        centred = rows - centre
        shift += _column_sums(centred)
        m2 += (centred.T @ centred).double()
    shift /= size
    return centre.double() + shift, m2 - len(probabilities) * torch.outer(shift, shift)


def _column_sums(rows: Tensor) -> Tensor:
    """[columns] float64 sums of [n, columns] float32 rows; a product with ones is faster than a sum in float64."""
    sums = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for block in rows.split(_ROWS) if len(rows) else ():
        sums += (block.new_ones(len(block)) @ block).double()
    return sums


def _part_moments(
    router_logits: Tensor, chosen: Tensor, experts_per_token: int, expert_norms: Sequence[ExpertNorms]
) -> list[NDArray[np.float64]]:
    """Fields of `RouterMoments` after `count` of the `chosen` [sequences, length] tokens, each [layers, ...]."""
    layers = range(router_logits.shape[2])
    rows = router_logits[chosen]
    fields = [_layer_moments(rows[:, layer].float(), experts_per_token) for layer in layers]
    columns = [np.stack([values[index] for values in fields]) for index in range(4)]
    reap = np.full_like(columns[0], np.nan)
    if expert_norms:
        experts = router_logits.shape[3]
        reap = np.stack([_summed_norms(norms, chosen, experts) for norms in expert_norms])
    return [*columns, reap]


def _layer_moments(logits: Tensor, experts_per_token: int) -> tuple[NDArray[np.float64], ...]:
    """(mean, m2, selected_together, gate_mass) of [tokens, experts] logits, which may be no tokens at all."""
    mean, m2 = comoments(torch.softmax(logits, dim=-1))
    together = torch.zeros_like(m2)
    gate_mass = torch.zeros_like(mean)
    for rows in logits.split(_ROWS) if len(logits) else ():
        top = rows.topk(experts_per_token, dim=-1)
        # scatter and product, not bincount: its atomic additions on a GPU have no fixed order
        selected = torch.zeros_like(rows).scatter(1, top.indices, 1.0)
        together += (selected.T @ selected).double()
        gates = torch.zeros_like(rows).scatter(1, top.indices, torch.softmax(top.values, dim=-1))
        gate_mass += _column_sums(gates)
    matrices = (pack_symmetric(values.cpu().numpy()) for values in (m2, together))
    packed_m2, packed_together = matrices
    return mean.cpu().numpy(), packed_m2, packed_together, gate_mass.cpu().numpy()


def _summed_norms(norms: ExpertNorms, chosen: Tensor, experts: int) -> NDArray[np.float64]:
    """[experts] sum of gate x output norm over the `chosen` [sequences, length] tokens."""
    rows = chosen.flatten()
    selected = norms.indices.to(chosen.device)[rows]
    values = norms.contributions.to(chosen.device)[rows]
    spread = torch.zeros(len(values), experts, device=chosen.device).scatter(1, selected, values)
    summed: NDArray[np.float64] = spread.sum(dim=0, dtype=torch.float64).cpu().numpy()
    return summed


def _check_finite(
    router_logits: Tensor, expert_norms: Sequence[ExpertNorms], valid: Tensor, names: Sequence[str]
) -> None:
    """Raise when a logit or an output of a valid token is NaN or infinite."""
    found = [("router logits of", _first_broken(router_logits, valid))]
    if expert_norms:
        outputs = [norms.contributions.to(valid.device).view(*valid.shape, -1) for norms in expert_norms]
        found.append(("expert outputs of", _first_broken(torch.stack(outputs, dim=2), valid)))
    broken = [(*place, what) for what, place in found if place is not None]
    if broken:
        # the router of a layer is before its experts, and whatever they break reaches all later layers
        layer, sequence, position, what = min(broken, key=lambda entry: entry[0])
        name = names[sequence] if names else str(sequence)
        raise DataError(
            f"{what} layer {layer} are NaN or infinite in sequence {name}, token {position}",
            "check the base model's weights, or try model.dtype=float32",
        )


def _first_broken(values: Tensor, valid: Tensor) -> tuple[int, int, int] | None:
    """(layer, sequence, token) of the first valid token whose [sequences, length, layers, n] values are not finite."""
    if torch.isfinite(values[valid].sum()):  # NaN and infinity survive a sum
        return None
    places = torch.nonzero((valid[:, :, None] & ~torch.isfinite(values).all(dim=-1)).permute(2, 0, 1))
    if not len(places):
        return None
    layer, sequence, position = places[0].tolist()
    return layer, sequence, position
