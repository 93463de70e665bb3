"""What vLLM must know of an export's configuration before it chooses quantisation, chat format and kernels."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsMxfp4
from vllm.model_executor.models.config import GptOssForCausalLMConfig
from vllm.platforms import current_platform

logger = init_logger(__name__)

DEQUANTISE = "dequantise_experts"
_BASE_TYPE = "gpt_oss"
_MXFP4, _GPT_OSS_MXFP4 = "mxfp4", "gpt_oss_mxfp4"
_HARMONY_VOCABULARY = 201_088  # tokens of every released GPT-OSS; its chat format needs those above 200,000


class ExportConfig(GptOssForCausalLMConfig):
    """vLLM's own settings for GPT-OSS, for an export.

    Which class computes is decided by the architecture's name alone. But vLLM also looks for `model_type` "gpt_oss",
    which only the base has, so what hangs on it is settled here, in vLLM's memory and never in the file.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Called by vLLM when it has read config.json and not yet looked at the quantisation."""
        config = model_config.hf_config
        if _speaks_harmony(config):
            config.model_type = _BASE_TYPE
        if (getattr(config, "quantization_config", None) or {}).get("quant_method") == _MXFP4:
            _settle_quantisation(config)
        model_config.model_arch_config = model_config.get_model_arch_config()

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Called by vLLM when it knows all else: GPT-OSS's parser of replies, for who writes in its chat format."""
        if _speaks_harmony(vllm_config.model_config.hf_config):
            GptOssForCausalLMConfig.verify_and_update_config(vllm_config)


def _speaks_harmony(config: Any) -> bool:
    """Whether vLLM is to write GPT-OSS's chat format itself, which it does with the token ids of the released models.

    A model with another vocabulary is served with the chat template of its directory.
    """
    return int(config.vocab_size) >= _HARMONY_VOCABULARY


def _settle_quantisation(config: Any) -> None:
    """MXFP4 as GPT-OSS stores it, or none where vLLM could not compute with it."""
    if _computes_mxfp4():
        config.quantization_config["quant_method"] = _GPT_OSS_MXFP4
        return
    logger.warning(
        "vLLM has no MXFP4 kernel for this processor (it needs AMX): the routed experts are dequantised while they "
        "are loaded, to four times their size in bfloat16"
    )
    del config.quantization_config
    setattr(config, DEQUANTISE, True)


def _computes_mxfp4() -> bool:
    """On a CPU vLLM has one kernel; elsewhere it chooses among several, and says so if none fits."""
    return not current_platform.is_cpu() or CPUExpertsMxfp4._supports_current_device()
