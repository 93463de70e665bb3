"""What the tests run in vLLM's environment: `engine.py TASK '{"directory": ..., "output": ...}'`.

vLLM computes in this process, so that a task can reach the model; everything goes through vLLM's public `LLM`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Arrays = dict[str, "np.ndarray[Any, Any]"]


def load(directory: str, dtype: str = "float32", **_: Any) -> Any:
    """vLLM's engine without a tokenizer or a cache of prefixes, and with all log-probabilities on offer."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    return LLM(
        directory,
        dtype=dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_logprobs=-1,
        max_model_len=256,
        skip_tokenizer_init=True,
    )


def logprobs(llm: Any, prompts: list[list[int]], tokens: int = 1, prefix: str = "") -> Arrays:
    """Log-probabilities [length - 1, vocabulary] of every prompt, and its greedy continuation."""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=tokens, temperature=0, prompt_logprobs=-1, ignore_eos=True, detokenize=False)
    arrays: Arrays = {}
    finished = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    for number, request in enumerate(finished):
        rows = [[row[token].logprob for token in range(len(row))] for row in request.prompt_logprobs[1:]]
        arrays[f"{prefix}logprobs{number}"] = np.array(rows, np.float32)
        arrays[f"{prefix}tokens{number}"] = np.array(request.outputs[0].token_ids)
    return arrays


def compute(prompts: list[list[int]], tokens: int = 1, **arguments: Any) -> Arrays:
    """The log-probabilities and continuations of a model."""
    return logprobs(load(**arguments), prompts, tokens)


def alter(prompts: list[list[int]], altered: str, **arguments: Any) -> Arrays:
    """The same with one shared tensor after the other replaced by that of the file `altered`, then scales of zero."""
    from safetensors.torch import load_file

    llm = load(**arguments)
    before = llm.apply_model(lambda model: {n: p.clone() for n, p in model.shared_parameters().items()})[0]
    arrays = logprobs(llm, prompts, prefix="before:")
    for name, tensor in load_file(altered).items():
        llm.apply_model(_filled(before | {name: tensor}))
        arrays |= logprobs(llm, prompts, prefix=f"{name}:")
    for what in ("scale", "down_proj"):
        zeros = {name: torch.zeros_like(tensor) for name, tensor in before.items() if what in name}
        llm.apply_model(_filled(before | zeros))
        arrays |= logprobs(llm, prompts, prefix=f"no {what}:")
    return arrays


def _filled(tensors: dict[str, torch.Tensor]) -> Callable[[Any], None]:
    def fill(model: Any) -> None:
        from nexus_ray.vllm_plugin.shared_tensors import SharedTensors, described

        shared = SharedTensors(described(model.config.to_dict()), model.shared_parameters())
        assert list(shared.taken_from(tensors.items())) == []
        shared.require_complete()

    return fill


def inspect_packed(directory: str) -> Arrays:
    """The parameters of an MXFP4 export where vLLM takes the processor for one that has its MXFP4 kernel.

    It loads and packs the experts for that kernel, but nothing is computed, which other processors cannot.
    """
    torch.cpu._is_amx_tile_supported = lambda: True  # type: ignore[assignment]
    llm = load(directory, dtype="bfloat16")
    parameters = llm.apply_model(lambda model: {n: p.detach().clone() for n, p in model.named_parameters()})[0]
    return {name: (value.float() if value.is_floating_point() else value).numpy() for name, value in parameters.items()}


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    destination = given.pop("output", None)
    tasks: dict[str, Callable[..., Arrays]] = {"compute": compute, "alter": alter, "inspect_packed": inspect_packed}
    results = tasks[sys.argv[1]](**given)
    np.savez(destination, **results)
    sys.stdout.flush()
    os._exit(0)  # vLLM's own end takes seconds and has nothing left to do
