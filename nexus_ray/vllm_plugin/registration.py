"""Tells vLLM which class serves an export, and what to settle before it loads one."""

from __future__ import annotations

from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry

from nexus_ray.huggingface.export import ARCHITECTURE
from nexus_ray.huggingface.registration import register_configuration
from nexus_ray.vllm_plugin.configuration import ExportConfig


def register_with_vllm() -> None:
    """Register configuration, model class and configuration hook; calling it again is harmless."""
    register_configuration()
    # By name, so that a process which only schedules requests does not load the layers.
    ModelRegistry.register_model(ARCHITECTURE, "nexus_ray.vllm_plugin.model:NexusGptOssForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = ExportConfig
