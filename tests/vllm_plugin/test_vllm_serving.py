"""`vllm serve` answers for an export; one that is not whole is refused by name; MXFP4 experts reach vLLM's kernels."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from vllm_plugin.conftest import ENVIRONMENT, reference

pytestmark = pytest.mark.vllm

SHARED = "model-shared-experts.safetensors"
PROMPT = "Good morrow, my lord; what news of the king?"


@pytest.fixture(scope="module")
def server(
    plain_export: Path, vllm_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client of `vllm serve EXPORT`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager", "--max-model-len", 512]
    command = [ENVIRONMENT / "bin" / "vllm", "serve", plain_export, "--served-model-name", "student", *options]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(part) for part in command], env=vllm_environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            _wait_until_ready(client, process, log)
            yield client
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    pytest.fail(log.read_text()[-4000:])


def test_the_service_lists_the_student(server: httpx.Client) -> None:
    assert [model["id"] for model in server.get("/v1/models").json()["data"]] == ["student"]


def test_a_completion_is_the_greedy_one_of_transformers(server: httpx.Client, plain_export: Path) -> None:
    request = {"model": "student", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = server.post("/v1/completions", json=request | {"return_token_ids": True}).json()
    prompt = AutoTokenizer.from_pretrained(plain_export)(PROMPT).input_ids
    assert answer["choices"][0]["prompt_token_ids"] == prompt
    expected = reference(plain_export, [prompt], torch.float32, tokens=12)["tokens0"]
    assert answer["choices"][0]["token_ids"] == expected.tolist()


def test_a_chat_uses_the_template_of_a_model_with_a_vocabulary_of_its_own(
    server: httpx.Client, plain_export: Path
) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    request = {"model": "student", "messages": messages, "max_tokens": 4, "temperature": 0, "return_token_ids": True}
    answer = server.post("/v1/chat/completions", json=request)
    assert answer.status_code == 200, answer.text
    tokenizer = AutoTokenizer.from_pretrained(plain_export)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert answer.json()["prompt_token_ids"] == expected


def _copy_with(directory: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of an export with another file of shared tensors, and an index of what is there."""
    shutil.copytree(directory, copy)
    tensors = load_file(copy / SHARED)
    change(tensors)
    save_file(tensors, copy / SHARED)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    kept = {name: file for name, file in index["weight_map"].items() if file != SHARED}
    index["weight_map"] = kept | dict.fromkeys(tensors, SHARED)
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    return copy


@pytest.mark.parametrize("kind", ["plain_export", "packed_export"])
def test_an_export_without_one_of_its_tensors_is_refused_by_name(
    kind: str,
    request: pytest.FixtureRequest,
    engine: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    name = "model.layers.1.shared_expert.token_gate.bias"
    broken = _copy_with(request.getfixturevalue(kind), tmp_path / "broken", lambda tensors: tensors.pop(name))
    done = engine("compute", directory=broken, dtype="bfloat16", prompts=[[1, 2, 3]], output=tmp_path / "out.npz")
    assert done.returncode != 0
    assert f"the export lacks 1 of 14 tensors of its shared experts: {name}" in done.stdout + done.stderr


def test_a_tensor_that_belongs_nowhere_is_refused_by_name(
    plain_export: Path, engine: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    name = "model.layers.2.shared_expert.scale"
    broken = _copy_with(plain_export, tmp_path / "broken", lambda tensors: tensors.update({name: torch.ones(())}))
    done = engine("compute", directory=broken, prompts=[[1, 2, 3]], output=tmp_path / "out.npz")
    assert done.returncode != 0
    assert f"{name} belongs to no shared expert that config.json describes" in done.stdout + done.stderr


def test_without_the_plugin_vllm_does_not_serve_the_base_in_the_students_place(
    plain_export: Path, engine: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    output = tmp_path / "out.npz"
    done = engine("compute", plugins="", directory=plain_export, prompts=[[1, 2, 3]], output=output)
    assert done.returncode != 0
    assert "nexus_gpt_oss" in done.stdout + done.stderr


def test_mxfp4_experts_stay_packed_for_vllms_kernel_and_shared_experts_are_loaded_beside_them(
    packed_export: Path, vllm_outputs: Callable[..., Any]
) -> None:
    found = vllm_outputs("inspect_packed", directory=packed_export)
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts.routed_experts"
        assert found[f"{experts}.w13_weight"].dtype == np.uint8
        assert found[f"{experts}.w13_weight_scale"].dtype == np.uint8
        assert found[f"{experts}.w2_weight"].any()
    stored = load_file(packed_export / SHARED)
    for name, tensor in stored.items():
        expected = tensor.to(torch.float32 if name.endswith("scale") else torch.bfloat16).float()
        loaded = found[name.replace(".shared_expert.", ".mlp.shared_expert.")]
        assert np.array_equal(loaded, expected.numpy()), name
