"""transformers learns the architecture in either order of imports, and costs nothing where it is not used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_PRINT = """
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
print(json.dumps([type(config).__name__, transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]))
"""
_NEXUS_FIRST = """
import importlib.util, json, sys
import nexus_ray
assert importlib.util.find_spec("transformers") is not None  # asking whether it is installed must not use the hook up
assert "transformers" not in sys.modules
import transformers.models.gpt_oss.modeling_gpt_oss  # the deepest import there is
import transformers
"""
_OWN_MODULE_FIRST = """
import json, sys
import nexus_ray.huggingface.{}
import transformers
"""
_TRANSFORMERS_FIRST = """
import json, sys
import transformers
from transformers import AutoConfig
import nexus_ray
"""


def _run(code: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param(_NEXUS_FIRST, id="nexus first"),
        pytest.param(_TRANSFORMERS_FIRST, id="transformers first"),
        pytest.param(_OWN_MODULE_FIRST.format("configuration"), id="configuration first"),
        pytest.param(_OWN_MODULE_FIRST.format("modeling"), id="modeling first"),
    ],
)
def test_either_order_of_imports(exported: Path, imports: str) -> None:
    names = json.loads(_run(imports + _PRINT, str(exported)))
    assert names == ["NexusGptOssConfig", "NexusGptOssForCausalLM"]


def test_the_command_line_imports_neither_transformers_nor_torch() -> None:
    code = "import sys, nexus_ray.cli; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert _run(code) == "[]"


def test_reading_a_checkpoint_does_not_import_transformers() -> None:
    code = "import sys, nexus_ray.checkpoints.reader, nexus_ray.checkpoints.overlay, nexus_ray.families; "
    assert _run(code + "print('transformers' in sys.modules)") == "False"
