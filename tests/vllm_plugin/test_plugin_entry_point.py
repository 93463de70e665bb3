"""vLLM finds the plugin by its entry point; nexus-ray does without vLLM."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_entry_point_names_the_function_that_registers() -> None:
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, function = entries["vllm.general_plugins"]["nexus_ray"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_only_what_vllm_loads_imports_vllm() -> None:
    block = "import sys; sys.modules['vllm'] = None\n"  # an import of it fails now
    modules = ["vllm_plugin", "vllm_plugin.shared_tensors", "vllm_plugin.base_tensors"]
    code = block + "\n".join(f"import nexus_ray.{module}" for module in modules)
    subprocess.run([sys.executable, "-c", code], check=True)
