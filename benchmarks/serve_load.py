"""The HTTP service under load, against `transformers serve` and sequential `generate` on the same model.

    python benchmarks/serve_load.py --clients 32

Claims: no errors; at least the tokens per second of `transformers serve --continuous-batching`, which has the same
scheduler and paged cache, and at least 3 times those of one `generate` after another. All three answer the same chats
greedily with the base, in the same run, with the same number of threads; without batching `transformers serve` answers
one request at a time, which is measured on fewer requests and given beside. `mixed` is the same load with every other
request for the student. Ends with one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import command_line, print_result
from _load import Load, run_load
from _servers import ROOT, TINY, free_port, our_command, run_of, server, transformers_command
from transformers import AutoModelForCausalLM, AutoTokenizer

from nexus_ray.console import progress

_DOCUMENT_CHARACTERS = 300


def questions(count: int) -> list[str]:
    """Beginnings of held-out documents."""
    lines = (ROOT / "assets" / "text" / "shakespeare.heldout.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    joined = " ".join(texts)
    step = max(1, (len(joined) - _DOCUMENT_CHARACTERS) // count)
    return [joined[start : start + _DOCUMENT_CHARACTERS] for start in range(0, count * step, step)]


def bodies(texts: list[str], models: list[str], tokens: int) -> list[dict[str, Any]]:
    """One request a text, for these models in turn."""
    return [
        {
            "model": models[index % len(models)],
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for index, text in enumerate(texts)
    ]


def sequential(model: Path, texts: list[str], tokens: int, dtype: str) -> float:
    """Tokens per second of transformers' `generate`, one request after another."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    generated, seconds = 0, 0.0
    with progress("sequential generate", total=len(texts)) as advance:
        for number, text in enumerate([texts[0], *texts]):  # the first one warms up
            messages = [{"role": "user", "content": text}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            began = time.monotonic()
            output = loaded.generate(**inputs, max_new_tokens=tokens, do_sample=False)
            if number:
                seconds += time.monotonic() - began
                generated += output.shape[1] - inputs["input_ids"].shape[1]
                advance(1)
    return generated / seconds


def agreement(ours: Load, theirs: Load) -> float:
    """Share of the requests to which both servers gave the same text."""
    pairs = list(zip(ours.outcomes, theirs.outcomes, strict=False))
    return sum(one.text == other.text for one, other in pairs) / len(pairs)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all servers, one after another."""
    texts = questions(arguments.requests)
    few = texts[: arguments.sequential]
    base = bodies(texts, ["base"], arguments.tokens)
    mixed = bodies(texts, ["base", "bard"], arguments.tokens)
    stock = bodies(texts, [str(arguments.model)], arguments.tokens)
    overrides = [
        f"resources.cpus_per_worker={arguments.threads}",
        f"serve.max_concurrent_requests={2 * arguments.clients}",
        f"model.experts={arguments.experts}",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        overrides += run_of(folder, arguments.model, arguments.overlay, arguments.dtype)
        port = free_port()
        with server(our_command(port, overrides), port, "/healthz", folder / "ours.log", arguments.threads) as at:
            run_load(at, base[: arguments.clients], arguments.clients)
            ours, both = run_load(at, base, arguments.clients), run_load(at, mixed, arguments.clients)
        found = {}
        for batching, asked in ((True, stock), (False, stock[: arguments.sequential])):
            port = free_port()
            command = transformers_command(arguments.model, port, batching=batching)
            with server(command, port, "/health", folder / f"theirs-{batching}.log", arguments.threads) as at:
                run_load(at, asked[: arguments.clients if batching else 1], arguments.clients)
                found[batching] = run_load(at, asked, arguments.clients)
    alone = sequential(arguments.model, few, arguments.tokens, arguments.dtype)
    return {
        "clients": arguments.clients,
        "threads": arguments.threads,
        "experts": arguments.experts,
        **ours.summary(),
        "mixed": both.summary(),
        "transformers_serve": found[True].summary(),
        "transformers_serve_without_batching": found[False].summary(),
        "sequential_tokens_per_second": round(alone, 1),
        "same_text_as_transformers_serve": round(agreement(ours, found[True]), 3),
        "throughput_vs_transformers_serve": round(ours.tokens_per_second / found[True].tokens_per_second, 3),
        "throughput_vs_transformers_serve_without_batching": round(
            ours.tokens_per_second / found[False].tokens_per_second, 3
        ),
        "throughput_vs_sequential": round(ours.tokens_per_second / alone, 3),
    }


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--clients", type=int, default=32, help="requests at one time (default 32)")
    parser.add_argument("--requests", type=int, help="in all; default: 4 a client")
    parser.add_argument("--sequential", type=int, default=16, help="requests for what takes one at a time (default 16)")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of an answer (default 64)")
    parser.add_argument("--model", type=Path, default=TINY, help="default: the embedded one")
    parser.add_argument("--overlay", type=Path, default=ROOT / "runs" / "demo" / "overlay", help="of `make demo`")
    parser.add_argument("--experts", default="packed", help="model.experts of our service (default packed)")
    parser.add_argument("--dtype", default="bfloat16", help="of all of them (default bfloat16, as stored)")
    parser.add_argument("--threads", type=int, default=2, help="of torch, in each server (default 2)")
    arguments = parser.parse_args()
    arguments.requests = arguments.requests or 4 * arguments.clients
    torch.set_num_threads(arguments.threads)
    with command_line():
        print_result(measure(arguments))


if __name__ == "__main__":
    main()
