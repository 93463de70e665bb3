"""vLLM's own GPT-OSS with a shared expert in every layer.

Tensor parallelism splits the routed experts; a shared expert, which is small, is whole on every device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn
from vllm.model_executor.models import gpt_oss
from vllm.model_executor.models.utils import PPMissingLayer

from nexus_ray.families import FAMILIES
from nexus_ray.huggingface.modeling import shared_expert_shape
from nexus_ray.modeling.shared_expert import SharedExpert
from nexus_ray.vllm_plugin.base_tensors import dequantised, settled_routers
from nexus_ray.vllm_plugin.configuration import DEQUANTISE
from nexus_ray.vllm_plugin.shared_tensors import SHARED_EXPERT, SharedTensors, described

_FAMILY = FAMILIES["gpt_oss"]


class MLPBlockWithSharedExpert(gpt_oss.MLPBlock):
    """Router and routed experts as vLLM computes them, plus `shared_expert`."""

    shared_expert: SharedExpert

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] to the same."""
        # First, because vLLM's kernels may write the routed experts' output over their input.
        added = self.shared_expert(x)
        output: Tensor = super().forward(x) + added
        return output


class NexusGptOssForCausalLM(gpt_oss.GptOssForCausalLM):
    """GPT-OSS with shared experts, as `nexus-ray export` writes it."""

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # vLLM's constructor names the class of its decoder, so the layers are extended when they are there.
        for layer in self.model.layers:
            if not isinstance(layer, PPMissingLayer):
                _extend(layer.mlp, self.config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As in vLLM, with the shared experts' tensors and the trained routers in their places.

        Args:
            weights: names and tensors of all files, in any order.

        Returns:
            names of the parameters that were loaded.

        Raises:
            ArtefactError: shared tensors are missing, surplus or of another shape, or trained routers are not those
                that were exported.
        """
        shared = SharedTensors(described(self.config.to_dict()), self.shared_parameters())
        rest = settled_routers(shared.taken_from(weights), self.config.to_dict(), _FAMILY)
        if getattr(self.config, DEQUANTISE, False):
            rest = dequantised(rest, self.vllm_config.model_config.dtype)
        loaded = super().load_weights(rest)
        shared.require_complete()
        return loaded | {name for name, _ in self.named_parameters() if SHARED_EXPERT in name}

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """{name in the export: parameter} of the shared experts of this process's layers."""
        return {
            name.replace(".mlp.shared_expert.", ".shared_expert."): parameter
            for name, parameter in self.named_parameters()
            if ".mlp.shared_expert." in name
        }


def _extend(block: nn.Module, config: Any) -> None:
    """Make vLLM's MLP block one with a shared expert, in the model's type."""
    activation = functools.partial(_FAMILY.expert_activation, config=config.to_dict())
    block.__class__ = MLPBlockWithSharedExpert
    cast(MLPBlockWithSharedExpert, block).shared_expert = SharedExpert(shared_expert_shape(config), activation)
