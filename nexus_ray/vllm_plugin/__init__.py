"""vLLM serves what `nexus-ray export` writes: a plugin that it finds and loads by itself, in each of its processes.

vLLM is not a dependency of nexus-ray, and its environment is usually another one. So `registration`, `configuration`
and `model` import it and only vLLM imports them; the other modules know nothing of it.
"""


def register() -> None:
    """Make the architecture of exports known to vLLM (its entry point group `vllm.general_plugins` names this)."""
    from nexus_ray.vllm_plugin.registration import register_with_vllm

    register_with_vllm()
