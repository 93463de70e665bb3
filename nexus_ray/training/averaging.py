"""Sequential fine-tuning with averaging (SFA): at intervals the weights are drawn towards an anchor.

merged = alpha * anchor + (1 - alpha) * current (arXiv:2501.05559). The anchor `initial` is the overlay that training
began with: each merge pulls back to it, which is what the method is for. With `previous` it is the last merged
weights, as in Lookahead (Zhang et al., 2019, arXiv:1907.08610): it damps steps and pulls back to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from nexus_ray.config import AveragingSection
from nexus_ray.errors import ArtefactError
from nexus_ray.training.trainer import sum_over_workers

Weights = Mapping[str, Tensor]


class Averaging:
    """Merging of the trained parameters, the same on every worker.

    Args:
        section: how often, how much, and with which anchor.
        parameters: trained parameters by name, as training begins.
        initial: reads the initial weights of all of them, float32.
    """

    def __init__(
        self, section: AveragingSection, parameters: Mapping[str, nn.Parameter], initial: Callable[[], Weights]
    ) -> None:
        self._section = section
        self._parameters = parameters
        self._initial = initial
        self.kept: dict[str, Tensor] = {}  # what a checkpoint must hold
        if section.every is not None and section.anchor == "previous":
            self.kept = {f"anchor.{name}": parameter.detach().clone() for name, parameter in parameters.items()}

    def is_due(self, step: int) -> bool:
        """Whether the weights are merged after optimiser step number `step`."""
        return self._section.every is not None and (step + 1) % self._section.every == 0

    @torch.no_grad()
    def merge(self, names: Collection[str] | None = None) -> float:
        """Merge in place; the optimiser's moments stay. Called by every worker.

        Args:
            names: of the parameters to merge, by default all: what is frozen stays as it is.

        Returns:
            how far the weights moved (L2 norm).

        Raises:
            ArtefactError: a worker cannot read the anchor; the weights are as they were on all of them.
        """
        anchor, moved = self._agreed_anchor(), 0.0
        for name in self._parameters if names is None else names:
            parameter = self._parameters[name]
            before = parameter.detach().clone()
            parameter.lerp_(anchor[name].to(parameter.device), self._section.alpha)
            moved += float((parameter - before).double().square().sum())
            if self.kept:
                self.kept[f"anchor.{name}"].copy_(parameter)
        return moved**0.5

    def _agreed_anchor(self) -> Weights:
        """The anchor, if every worker has it: a merge on some workers only would leave them with different weights."""
        failure: ArtefactError | None = None
        anchor: Weights = {}
        try:
            anchor = self._anchor()
        except ArtefactError as error:
            failure = error
        device = next(iter(self._parameters.values())).device
        missing = int(sum_over_workers(torch.tensor(float(failure is not None), device=device)))
        if missing:
            raise failure or ArtefactError(f"{missing} other workers cannot read the anchor")
        return anchor

    def _anchor(self) -> Weights:
        if self.kept:
            return {name.removeprefix("anchor."): tensor for name, tensor in self.kept.items()}
        weights = self._initial()
        lacking = [name for name in self._parameters if name not in weights]
        if lacking:
            raise ArtefactError(f"the anchor has no {lacking[0]}")
        return weights
