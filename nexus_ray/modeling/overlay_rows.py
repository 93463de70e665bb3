"""Several overlays on one base, of which each token of a forward pass uses one or none.

Attention and routed experts run once for all tokens; a shared expert runs on the rows that belong to its overlay, and
so does a trained router. Tokens of the base are not touched: they are what the base computes for that batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from nexus_ray.checkpoints.overlay import OverlayConfig, load_overlay
from nexus_ray.modeling.loading import LoadedModel, activation, load_shared_experts
from nexus_ray.modeling.shared_expert import SharedExpert
from nexus_ray.modeling.trained_routers import TrainedRouter, load_trained_routers
from nexus_ray.storage import Place


@dataclass(frozen=True, eq=False)
class ServedOverlay:
    """What one overlay adds, ready to compute: a shared expert a layer, and router differences where it has some."""

    description: OverlayConfig
    experts: tuple[SharedExpert, ...]
    routers: tuple[TrainedRouter, ...] | None


def read_overlay(base: LoadedModel, directory: Place) -> ServedOverlay:
    """Read an overlay for a base that is loaded without one, each part to where its layer is.

    Shared experts are held in the type that the base computes in, to which their tensors are rounded anyway.

    Raises:
        ArtefactError: the overlay is missing, damaged or belongs to another base.
    """
    description, tensors = load_overlay(directory, base.fingerprint)
    shared = load_shared_experts(description, tensors, activation(base.family, base.config))
    blocks = base.family.moe_blocks(base.model)
    for expert, block in zip(shared.layers, blocks, strict=True):
        expert.to(device=next(block.parameters()).device, dtype=base.model.dtype)
    experts = tuple(cast(SharedExpert, expert) for expert in shared.layers)
    if description.routers == "none":
        return ServedOverlay(description, experts, None)
    trained = load_trained_routers(description, tensors, base.family)
    trained.fit(base.family.routers(base.model))
    return ServedOverlay(description, experts, tuple(cast(TrainedRouter, router) for router in trained.routers))


@dataclass(frozen=True)
class _Rows:
    """The rows of one overlay in the present pass; None stands for all."""

    overlay: ServedOverlay
    rows: Tensor | None


class OverlayRows:
    """Lets each token of a pass compute with its own overlay.

    Args:
        base: loaded without an overlay; hooks are added to its MoE blocks and routers.
    """

    def __init__(self, base: LoadedModel) -> None:
        self._device = base.device
        self._present: list[_Rows] = []
        family, model = base.family, base.model
        blocks, routers = enumerate(family.moe_blocks(model)), enumerate(family.routers(model))
        self._hooks = [block.register_forward_hook(self._shared_hook(layer)) for layer, block in blocks]
        for layer, router in routers:
            self._hooks.append(router.register_forward_hook(self._router_hook(layer), prepend=True))

    def remove(self) -> None:
        """Take the hooks away again."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def assigned(self, segments: Sequence[tuple[ServedOverlay | None, int]]) -> Iterator[None]:
        """`assign` within the block; after it, all tokens are the base's."""
        self.assign(segments)
        try:
            yield
        finally:
            self._present = []

    def assign(self, segments: Sequence[tuple[ServedOverlay | None, int]]) -> None:
        """From now on consecutive tokens of a pass compute with these overlays.

        Args:
            segments: (an overlay, or None for the base; how many tokens) in the order of the tokens, rows of a batch
                one after the other.
        """
        total = sum(count for _, count in segments)
        rows: dict[ServedOverlay, list[Tensor]] = {}
        start = 0
        for overlay, count in segments:
            if overlay is not None:
                rows.setdefault(overlay, []).append(torch.arange(start, start + count))
            start += count
        joined = {overlay: torch.cat(parts) for overlay, parts in rows.items()}
        self._present = [
            _Rows(overlay, None if len(index) == total else index.to(self._device)) for overlay, index in joined.items()
        ]

    def _shared_hook(self, layer: int) -> Callable[..., Any]:
        def add(_block: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if not self._present:
                return None
            total = output[0] if isinstance(output, tuple) else output
            for present in self._present:
                total = _add(total, inputs[0], present.overlay.experts[layer], present.rows)
            return (total, *output[1:]) if isinstance(output, tuple) else total

        return add

    def _router_hook(self, layer: int) -> Callable[..., Any]:
        def reroute(router: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            for present in self._present:
                if present.overlay.routers is not None:
                    output = _reroute(present.overlay.routers[layer], router, inputs[0], output, present.rows)
            return output

        return reroute


def _add(output: Tensor, inputs: Tensor, expert: SharedExpert, rows: Tensor | None) -> Tensor:
    """`output` with the expert's added in these rows; tensors are [..., hidden], rows count flattened tokens."""
    if rows is None:
        return output + expert(inputs)
    rows = rows.to(output.device)
    mine = expert(inputs.reshape(-1, inputs.shape[-1]).index_select(0, rows))
    return output.reshape(-1, output.shape[-1]).index_add(0, rows, mine).view(output.shape)


def _reroute(difference: TrainedRouter, router: nn.Module, inputs: Tensor, output: Any, rows: Tensor | None) -> Any:
    """What the router returns, with these rows routed by the trained router; everything is [tokens, ...]."""
    inputs = inputs.reshape(-1, inputs.shape[-1])
    if rows is None:
        return difference.reroute(router, (inputs,), output)
    rows = rows.to(inputs.device)
    mine = difference.reroute(router, (inputs.index_select(0, rows),), output)
    return tuple(whole.index_copy(0, rows, part.to(whole.dtype)) for whole, part in zip(output, mine, strict=True))
