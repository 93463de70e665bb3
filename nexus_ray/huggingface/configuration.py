"""Configuration of an exported model: the base's own, and what the shared experts look like."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, GptOssConfig

from nexus_ray.huggingface.registration import MODEL_TYPE, register_model

if TYPE_CHECKING:
    from nexus_ray.checkpoints.overlay import TrainedKind

_EXPERTS_MEMORY = ("dequantised", "packed")


@strict
class NexusGptOssConfig(GptOssConfig):
    """A GPT-OSS configuration with shared experts.

    Attributes:
        shared_experts: `width`, `token_gate` and the rest of the overlay's description, as `nexus-ray export` wrote
            it; `tensors_sha256` is the digest of the shared experts' tensors, `routers_sha256` that of trained routers.
        experts_memory: how `from_pretrained` keeps the routed experts: "dequantised" (as transformers does it) or
            "packed" (as they are stored: MXFP4 stays MXFP4, with a backward pass).
        packed_quantization_config: the checkpoint's `quantization_config` while its experts are packed, where
            transformers must not see it; `to_dict` puts it back.
    """

    model_type = MODEL_TYPE

    shared_experts: dict[str, Any] | None = None
    experts_memory: str = "dequantised"
    packed_quantization_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        register_model()

    @property
    def packed(self) -> bool:
        """Whether the routed experts stay as they are stored.

        Raises:
            ValueError: `experts_memory` is unknown. (transformers sets it unchecked, after construction.)
        """
        if self.experts_memory not in _EXPERTS_MEMORY:
            raise ValueError(f"experts_memory is {self.experts_memory!r}, not one of {', '.join(_EXPERTS_MEMORY)}")
        return self.experts_memory == "packed"

    @property
    def trained_routers(self) -> TrainedKind:
        """Which parameters of the routers were trained."""
        routers: TrainedKind = (self.shared_experts or {}).get("routers", "none")
        return routers

    def kept_packed(self) -> Self:
        """A copy in which the quantisation is out of transformers' sight."""
        config = copy.deepcopy(self)
        quantisation = getattr(config, "quantization_config", None)
        if quantisation is not None:
            config.packed_quantization_config = quantisation
            del config.quantization_config
        return config

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint's config.json has it, whatever the experts' form in memory."""
        values: dict[str, Any] = super().to_dict()
        quantisation = values.pop("packed_quantization_config", None)
        values.pop("experts_memory", None)
        if quantisation is not None:
            values["quantization_config"] = quantisation
        return values


AutoConfig.register(MODEL_TYPE, NexusGptOssConfig, exist_ok=True)
