"""`NexusGptOssForCausalLM`: GPT-OSS with a shared expert in every decoder layer.

transformers' native MXFP4 path replaces a layer's whole `mlp` after the model is built and drops what was inside it
or hooked to it. Therefore a shared expert is a child of the decoder layer, beside `mlp`, and the layer adds its output
to that of whatever module is its `mlp` now. Being the layer's child also keeps it on the layer's device under
`device_map`.
"""

from __future__ import annotations

import copy
import functools
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssForCausalLM, GptOssModel, initialization
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssTopKRouter

from nexus_ray.families import FAMILIES
from nexus_ray.huggingface.configuration import NexusGptOssConfig
from nexus_ray.huggingface.exported_routers import trained_names
from nexus_ray.modeling.packed_experts import PackedExperts
from nexus_ray.modeling.shared_expert import (
    Activation,
    SharedExpert,
    SharedExpertShape,
    shared_experts_are_off,
    shared_experts_off,
)

SHARED_EXPERT = ".shared_expert."
_FAMILY = FAMILIES["gpt_oss"]


def shared_expert_shape(config: NexusGptOssConfig) -> SharedExpertShape:
    """Of one layer.

    Raises:
        ValueError: the configuration describes no shared experts.
    """
    described = config.shared_experts or {}
    try:
        return SharedExpertShape(config.hidden_size, int(described["width"]), bool(described["token_gate"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json: shared_experts needs `width` and `token_gate`, but is {described}") from error


class NexusGptOssDecoderLayer(GptOssDecoderLayer):
    """A GPT-OSS layer: routed experts in `mlp` as the configuration wants them, plus `shared_expert`.

    Where the router in `mlp` was trained, `base_router` is the one it was, for when the shared experts are off.
    """

    def __init__(self, config: NexusGptOssConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        values = config.to_dict()
        activation: Activation = functools.partial(_FAMILY.expert_activation, config=values)
        if config.packed:
            self.mlp.experts = PackedExperts(
                _FAMILY.dimensions(values),
                activation,
                packed=config.packed_quantization_config is not None,
                dtype=torch.get_default_dtype(),
            )
        self.shared_expert = SharedExpert(shared_expert_shape(config), activation)
        self.base_router = GptOssTopKRouter(config) if config.trained_routers != "none" else None

    def forward(self, hidden_states: Tensor, **attention: Any) -> Tensor:
        """[batch, length, hidden] to the same; `attention` is what `self_attn` takes besides."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **attention)
        hidden_states = hidden_states + attended
        inputs = self.post_attention_layernorm(hidden_states)
        output, _ = self._block()(inputs)
        if not shared_experts_are_off():
            output = output + self.shared_expert(inputs)
        return hidden_states + output

    def _block(self) -> nn.Module:
        """The MoE block as it is or, while the shared experts are off, as it was with the base's router."""
        if self.base_router is None or not shared_experts_are_off():
            block: nn.Module = self.mlp
            return block
        block = copy.copy(self.mlp)  # of its own, since another thread may be using the student's at the same time
        block._modules = self.mlp._modules | {"router": self.base_router}
        return block


class NexusGptOssModel(GptOssModel):
    """The decoder."""

    config_class = NexusGptOssConfig
    _no_split_modules = ("NexusGptOssDecoderLayer",)

    def __init__(self, config: NexusGptOssConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            NexusGptOssDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _initialise(module)


class NexusGptOssForCausalLM(GptOssForCausalLM):
    """GPT-OSS with shared experts, as `nexus-ray export` writes it.

    Load it with `AutoModelForCausalLM.from_pretrained(directory)`; `experts_memory="packed"` keeps the routed experts
    as they are stored.

    Raises:
        ValueError: the configuration describes no shared experts.
    """

    config_class = NexusGptOssConfig
    _no_split_modules = ("NexusGptOssDecoderLayer",)

    def __init__(self, config: NexusGptOssConfig) -> None:
        super().__init__(config)
        self.model = NexusGptOssModel(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _initialise(module)

    @classmethod
    def from_pretrained(cls, directory: Any, *args: Any, config: Any = None, **kwargs: Any) -> Self:
        """As in transformers; with `experts_memory="packed"` its MXFP4 quantiser is left out."""
        if config is None and "experts_memory" in kwargs:  # the auto class reads the configuration and comes back
            model: Self = AutoModelForCausalLM.from_pretrained(directory, *args, **kwargs)
            return model
        if isinstance(config, NexusGptOssConfig) and config.packed:
            if kwargs.get("quantization_config") is not None:
                raise ValueError('experts_memory="packed" keeps the stored form: leave quantization_config out')
            config = config.kept_packed()
        loaded: Self = super().from_pretrained(directory, *args, config=config, **kwargs)
        return loaded

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As in transformers; experts that were dequantised are saved as what they are, plain matrices."""
        if getattr(self, "hf_quantizer", None) is None:
            # transformers 5.23 undoes a dequantisation in name only: it writes plain matrices as `*_blocks`, which
            # nothing can load.
            kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, **kwargs)

    def shared_tensors(self) -> dict[str, nn.Parameter]:
        """{name in the checkpoint: parameter} of all shared experts and trained routers."""
        routers = trained_names(_FAMILY, self.config.num_hidden_layers, self.config.trained_routers)
        return {name: value for name, value in self.named_parameters() if SHARED_EXPERT in name or name in routers}

    def shared_experts_off(self) -> AbstractContextManager[None]:
        """Within the block, in this thread or task, the model computes exactly what its base does."""
        return shared_experts_off()


def _initialise(module: nn.Module) -> None:
    """Values of parameters that no checkpoint gave: transformers knows only its own modules."""
    if isinstance(module, SharedExpert):
        initialization.ones_(module.scale)
    elif isinstance(module, PackedExperts):
        for parameter in module.parameters():
            initialization.zeros_(parameter)


AutoModelForCausalLM.register(NexusGptOssConfig, NexusGptOssForCausalLM, exist_ok=True)
