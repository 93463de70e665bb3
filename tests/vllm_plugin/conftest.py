"""Fixtures: exports of the micro model with MXFP4 and with plain experts, and vLLM in the environment it has."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssForCausalLM

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import add_routers, load_overlay, load_overlay_config, save_overlay
from nexus_ray.huggingface.export import export

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-vllm"
LONG = 150  # tokens: more than the micro model's attention window of 128

Runs = dict[str, "np.ndarray[Any, Any]"]


@pytest.fixture(scope="session")
def vllm_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables for a process that runs vLLM, which keeps its caches out of the home directory."""
    if not (ENVIRONMENT / "bin" / "python").exists():
        pytest.skip("vLLM has an environment of its own, .venv-vllm: create it with `make vllm-env`")
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm-cache")),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings


@pytest.fixture(scope="session")
def engine(vllm_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function (task, plugins=None, **arguments) -> the finished process of `engine.py`."""

    def run(task: str, plugins: str | None = None, **arguments: Any) -> subprocess.CompletedProcess[str]:
        environment = vllm_environment | ({} if plugins is None else {"VLLM_PLUGINS": plugins})
        command = [ENVIRONMENT / "bin" / "python", Path(__file__).with_name("engine.py"), task]
        given = json.dumps(arguments, default=str)
        return subprocess.run(
            [*command, given], env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    return run


@pytest.fixture(scope="session")
def vllm_outputs(
    engine: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Runs]:
    """A function (task, **arguments) -> the arrays that `engine.py` wrote."""

    def run(task: str, **arguments: Any) -> Runs:
        output = tmp_path_factory.mktemp("vllm") / "out.npz"
        done = engine(task, output=output, **arguments)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        with np.load(output) as arrays:
            return dict(arrays)

    return run


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Token ids of a short and a long prompt."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 4096, (length,), generator=generator).tolist() for length in (24, LONG)]


@pytest.fixture(scope="session")
def packed_export(tmp_path_factory: pytest.TempPathFactory, micro_model: Path, micro_overlay: Path) -> Path:
    """The micro model, whose experts are MXFP4, with the random overlay."""
    return export(micro_model, micro_overlay, tmp_path_factory.mktemp("exports") / "packed").directory


@pytest.fixture(scope="session")
def plain_base(tmp_path_factory: pytest.TempPathFactory, micro_model: Path) -> Path:
    """The micro model with the same experts as plain bfloat16 matrices."""
    path = tmp_path_factory.mktemp("models") / "plain"
    model = GptOssForCausalLM.from_pretrained(micro_model, dtype=torch.bfloat16)
    model.save_pretrained(path, save_original_format=False)
    AutoTokenizer.from_pretrained(micro_model).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def overlay_for(tmp_path_factory: pytest.TempPathFactory, micro_overlay: Path) -> Callable[..., Path]:
    """A function (base, routers="none") -> the random overlay for that base, with random router differences."""

    def make(base: Path, routers: Any = "none") -> Path:
        description, tensors = load_overlay(micro_overlay, load_overlay_config(micro_overlay).base_fingerprint)
        description, tensors = add_routers(description, tensors, routers, 8)
        generator = torch.Generator().manual_seed(5)
        for name in sorted(tensors):
            if name.startswith("routers."):
                tensors[name] = torch.randn(tensors[name].shape, generator=generator) * 0.3
        directory = tmp_path_factory.mktemp("overlays") / "overlay"
        save_overlay(directory, description.model_copy(update={"base_fingerprint": fingerprint(base)}), tensors)
        return directory

    return make


@pytest.fixture(scope="session")
def plain_export(tmp_path_factory: pytest.TempPathFactory, plain_base: Path, overlay_for: Callable[..., Path]) -> Path:
    """The plain base with the random overlay."""
    return export(plain_base, overlay_for(plain_base), tmp_path_factory.mktemp("exports") / "plain").directory


@pytest.fixture(scope="session")
def routed_export(tmp_path_factory: pytest.TempPathFactory, plain_base: Path, overlay_for: Callable[..., Path]) -> Path:
    """The plain base with the random overlay and trained routers."""
    overlay = overlay_for(plain_base, "all")
    return export(plain_base, overlay, tmp_path_factory.mktemp("exports") / "routed").directory


@torch.no_grad()
def reference(
    directory: Path,
    prompts: list[list[int]],
    dtype: torch.dtype,
    tokens: int = 0,
    altered: Mapping[str, torch.Tensor] | None = None,
) -> Runs:
    """What transformers computes: log-probabilities of all tokens at all positions, and greedy continuations.

    Args:
        directory: of an export or a base.
        prompts: token ids.
        dtype: to compute in.
        tokens: to generate.
        altered: tensors in the place of the checkpoint's.
    """
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    parameters = dict(model.named_parameters())
    for name, tensor in (altered or {}).items():
        parameters[name].copy_(tensor)
    runs: Runs = {}
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        runs[f"logprobs{number}"] = model(ids).logits[0, :-1].float().log_softmax(-1).numpy()
        if tokens:
            grown = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            runs[f"tokens{number}"] = grown[0, len(prompt) :].numpy()
    return runs
