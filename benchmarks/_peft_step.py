"""A training step as a user of PEFT takes it: LoRA on transformers' GPT-OSS, whose experts it dequantises to bfloat16.

Everything is PEFT's and transformers' own: loading, adapters (float32 as PEFT makes them, as our shared experts are),
gradient checkpointing, loss. With `fused_loss` the next-token loss is this project's instead, which never forms the
logits of a whole batch; so the two ways of training can be compared without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Mxfp4Config

from nexus_ray.training.losses.chunked import CROSS_ENTROPY, output_losses

# What each kind of adapter is on: `all-linear` is the attention's four projections, the only nn.Linear in the layers.
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": "all-linear"},
    "experts": {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}
_RANK, _ALPHA = 8, 16  # of OpenAI's recipe for GPT-OSS


@dataclass(frozen=True)
class PeftSettings:
    """What is trained, and how.

    Attributes:
        adapters: a key of `ADAPTERS`.
        implementation: transformers' experts implementation.
        checkpointing: gradient checkpointing.
        device: where.
    """

    adapters: str
    implementation: str
    checkpointing: bool
    device: str


class PeftSteps:
    """A LoRA model and its optimiser steps.

    Args:
        model: directory of the base.
        settings: what is trained, and how.
        learning_rate: of AdamW.
    """

    def __init__(self, model: Path, settings: PeftSettings, learning_rate: float) -> None:
        base = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.bfloat16,
            quantization_config=Mxfp4Config(dequantize=True),
            attn_implementation="eager",
            experts_implementation=settings.implementation,
            use_cache=False,
            device_map=settings.device,
        )
        self.model: PeftModel = get_peft_model(
            base, LoraConfig(r=_RANK, lora_alpha=_ALPHA, **ADAPTERS[settings.adapters])
        )
        if settings.checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=learning_rate)

    @property
    def weight_bytes(self) -> int:
        """Of the base and the adapters."""
        return sum(p.nbytes for p in self.model.parameters())

    def step(self, input_ids: Tensor, *, fused_loss: bool) -> float:
        """One optimiser step on [sequences, length] token ids; returns its loss in nats a token."""
        loss = self._fused(input_ids) if fused_loss else self.model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.item()

    def _fused(self, input_ids: Tensor) -> Tensor:
        causal: Any = self.model.get_base_model()
        hidden = causal.model(input_ids=input_ids).last_hidden_state[:, :-1].flatten(0, 1)
        next_ids = input_ids[:, 1:].flatten()
        weights = {CROSS_ENTROPY: 1 / len(next_ids)}
        return output_losses(hidden, causal.lm_head.weight, next_ids, None, weights)[0]
