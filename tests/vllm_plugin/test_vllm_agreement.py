"""vLLM computes what transformers does with an export: with every shared tensor, and with trained routers.

The yardstick in float32 is rounding: logits of up to 20, in sums of other orders. In bfloat16 it is how far
transformers itself is from its own float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_plugin.conftest import LONG, reference

pytestmark = pytest.mark.vllm

ROUNDING = 1e-3  # nats, of any token's log-probability; what is altered on purpose changes some by 0.1 and more
SHARED = "model-shared-experts.safetensors"


def _furthest(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> float:
    assert left.shape == right.shape
    return float(np.abs(left - right).max())


@pytest.mark.parametrize("name", ["plain_export", "routed_export"])
def test_float32_logprobs_and_greedy_continuations_are_those_of_transformers(
    name: str, request: pytest.FixtureRequest, vllm_outputs: Callable[..., Any], prompts: list[list[int]]
) -> None:
    directory = request.getfixturevalue(name)
    found = vllm_outputs("compute", directory=directory, prompts=prompts, tokens=16)
    expected = reference(directory, prompts, torch.float32, tokens=16)
    for number, prompt in enumerate(prompts):
        assert found[f"logprobs{number}"].shape == (len(prompt) - 1, 4117)
        print(f"{name}, prompt {number}:", _furthest(found[f"logprobs{number}"], expected[f"logprobs{number}"]))
        assert _furthest(found[f"logprobs{number}"], expected[f"logprobs{number}"]) < ROUNDING
        assert found[f"tokens{number}"].tolist() == expected[f"tokens{number}"].tolist()


def test_an_mxfp4_export_in_bfloat16_is_as_close_to_float32_as_transformers_in_bfloat16(
    packed_export: Path, vllm_outputs: Callable[..., Any], prompts: list[list[int]]
) -> None:
    found = vllm_outputs("compute", directory=packed_export, prompts=prompts, dtype="bfloat16")
    exact = reference(packed_export, prompts, torch.float32)
    rounded = reference(packed_export, prompts, torch.bfloat16)
    # The median, because the mean is of a few positions where rounding made a router choose another expert.
    ours, theirs = (
        np.median(np.concatenate([np.abs(run[name] - exact[name]).ravel() for name in ("logprobs0", "logprobs1")]))
        for run in (found, rounded)
    )
    print(f"median distance from float32: {ours:.4f}, of transformers {theirs:.4f}")
    assert ours < 1.25 * theirs


@pytest.fixture(scope="module")
def altered(tmp_path_factory: pytest.TempPathFactory, plain_export: Path) -> Path:
    """A file with another value for every shared tensor."""
    generator = torch.Generator().manual_seed(9)
    tensors = load_file(plain_export / SHARED)
    assert len(tensors) == 14
    path = tmp_path_factory.mktemp("altered") / SHARED
    noise = {name: torch.randn(tensor.shape, generator=generator) * 0.2 for name, tensor in tensors.items()}
    save_file({name: tensor + noise[name] for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def alterations(
    altered: Path, plain_export: Path, vllm_outputs: Callable[..., Any], prompts: list[list[int]]
) -> dict[str, Any]:
    """What vLLM computes with each tensor altered in turn, and without shared experts."""
    found: dict[str, Any] = vllm_outputs("alter", directory=plain_export, altered=altered, prompts=prompts[:1])
    return found


def test_each_shared_tensor_changes_the_logprobs_as_it_does_in_transformers(
    altered: Path, alterations: dict[str, Any], plain_export: Path, prompts: list[list[int]]
) -> None:
    for name, tensor in load_file(altered).items():
        found = alterations[f"{name}:logprobs0"]
        expected = reference(plain_export, prompts[:1], torch.float32, altered={name: tensor})["logprobs0"]
        print(name, _furthest(found, alterations["before:logprobs0"]), _furthest(found, expected))
        assert _furthest(found, alterations["before:logprobs0"]) > 50 * ROUNDING, name
        assert _furthest(found, expected) < ROUNDING, name


@pytest.mark.parametrize("what", ["scale", "down_proj"])
def test_shared_experts_of_zero_leave_the_base_that_vllm_serves_bit_for_bit(
    what: str, alterations: dict[str, Any], base_logprobs: np.ndarray[Any, Any]
) -> None:
    assert np.array_equal(alterations[f"no {what}:logprobs0"], base_logprobs)
    assert not np.array_equal(alterations["before:logprobs0"], base_logprobs)


@pytest.fixture(scope="module")
def base_logprobs(plain_base: Path, vllm_outputs: Callable[..., Any], prompts: list[list[int]]) -> Any:
    """Of the base, by vLLM's own `GptOssForCausalLM`."""
    return vllm_outputs("compute", directory=plain_base, prompts=prompts[:1])["logprobs0"]


def test_the_long_prompt_is_longer_than_the_attention_window(prompts: list[list[int]]) -> None:
    assert len(prompts[1]) == LONG > 128
