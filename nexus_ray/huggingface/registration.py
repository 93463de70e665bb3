"""Makes transformers know the architecture `nexus_gpt_oss` without importing transformers.

`import nexus_ray` must stay cheap: most commands never touch transformers, which costs seconds and 170 MB together
with torch. So the registration waits: where transformers is loaded already it happens at once, else when the import
of transformers ends, through a finder on `sys.meta_path`. The model class, which costs more than the configuration,
is registered when the first configuration of this architecture is made.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODEL_TYPE = "nexus_gpt_oss"
_TRANSFORMERS = "transformers"


def register_with_transformers() -> None:
    """Register the architecture now if transformers is loaded, else as soon as it is; calling it again is harmless."""
    if _TRANSFORMERS in sys.modules:
        register_configuration()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register_configuration() -> None:
    """Let `AutoConfig` make a `NexusGptOssConfig` of a config.json with `model_type` nexus_gpt_oss."""
    # The module registers its class when it ends. It may be the one whose import of transformers led here; then it is
    # not complete yet, and asking for the class would fail.
    import_module("nexus_ray.huggingface.configuration")


def register_model() -> None:
    """Let `AutoModelForCausalLM` make a `NexusGptOssForCausalLM` of a `NexusGptOssConfig`."""
    import_module("nexus_ray.huggingface.modeling")


class _Finder(MetaPathFinder):
    """Finds transformers as the other finders do, and registers the architecture when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TRANSFORMERS:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            _register_after(spec.loader)
        return spec


def _register_after(loader: object) -> None:
    """Extend `loader.exec_module`; only this instance, so that everything else it offers stays as it is."""
    execute = loader.exec_module  # type: ignore[attr-defined]

    def exec_module(module: ModuleType) -> None:
        execute(module)
        register_configuration()

    loader.exec_module = exec_module  # type: ignore[attr-defined]
