"""The HTTP service under load, against `transformers serve` and sequential `generate` on the same model.

    python benchmarks/serve_load.py --clients 32

Claims: no errors; at least the tokens per second of `transformers serve --continuous-batching`, which has the same
scheduler and paged cache, and at least 3 times those of one `generate` after another. All three answer the same chats
greedily with the base, in the same run, each with every number of torch threads of `--threads`; its best counts, since
on a small model one thread can beat two. Without batching `transformers serve` answers one request at a time,
which is measured on fewer requests and given beside. `mixed` is the same load with every other request for the student.
The routed experts are dequantised on all sides (`--experts packed` leaves ours as they are stored). Ends with one JSON
object.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _common import command_line, print_result
from _load import Load, run_load
from _servers import ROOT, TINY, free_port, our_command, run_of, server, transformers_command
from _texts import heldout_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from nexus_ray.console import progress

_DOCUMENT_CHARACTERS = 300


def questions(count: int) -> list[str]:
    """Beginnings of held-out documents."""
    joined = " ".join(heldout_texts("shakespeare"))
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


def sequential(model: Path, texts: list[str], tokens: int, dtype: str, threads: int) -> float:
    """Tokens per second of transformers' `generate`, one request after another."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    generated, seconds = 0, 0.0
    with progress(f"sequential generate, {threads} threads", total=len(texts)) as advance:
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
    """Share of the requests to which both servers began to answer alike: in bfloat16 long texts part in the end.

    `transformers serve` leaves the name of the channel in the text.
    """
    pairs = list(zip(ours.outcomes, theirs.outcomes, strict=True))
    return sum(one.text[:8] == other.text.removeprefix("final")[:8] for one, other in pairs) / len(pairs)


def ours(arguments: argparse.Namespace, folder: Path, threads: int) -> tuple[Load, Load]:
    """Our service with the base, and with base and student in turn."""
    texts = questions(arguments.requests)
    base, mixed = (bodies(texts, models, arguments.tokens) for models in (["base"], ["base", "bard"]))
    port = free_port()
    overrides = [
        *run_of(folder / f"ours-{threads}", arguments.model, arguments.overlay, arguments.dtype),
        f"resources.cpus_per_worker={threads}",
        f"serve.max_concurrent_requests={2 * arguments.clients}",
        f"serve.batch_requests={arguments.clients}",
        f"model.experts={arguments.experts}",
    ]
    with server(our_command(port, overrides), port, "/healthz", folder / "ours.log", threads) as address:
        run_load(address, base[: arguments.clients], arguments.clients)
        return run_load(address, base, arguments.clients), run_load(address, mixed, arguments.clients)


def theirs(arguments: argparse.Namespace, folder: Path, threads: int, *, batching: bool) -> Load:
    """`transformers serve`."""
    texts = questions(arguments.requests)[: None if batching else arguments.sequential]
    asked = bodies(texts, [str(arguments.model)], arguments.tokens)
    port = free_port()
    command = transformers_command(arguments.model, port, arguments.dtype, batching=batching)
    with server(command, port, "/health", folder / "theirs.log", threads) as address:
        run_load(address, asked[: arguments.clients if batching else 1], arguments.clients)
        return run_load(address, asked, arguments.clients)


def best(loads: dict[int, Load]) -> dict[str, Any]:
    """The summary of the fastest, and what each number of threads gave."""
    threads = max(loads, key=lambda number: loads[number].tokens_per_second)
    speeds = {str(number): round(load.tokens_per_second, 1) for number, load in loads.items()}
    return {"threads": threads, **loads[threads].summary(), "tokens_per_second_by_threads": speeds}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all servers, one after another."""
    few = questions(arguments.requests)[: arguments.sequential]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pairs = {threads: ours(arguments, folder, threads) for threads in arguments.threads}
        batched = {threads: theirs(arguments, folder, threads, batching=True) for threads in arguments.threads}
        single = {threads: theirs(arguments, folder, threads, batching=False) for threads in arguments.threads}
    alone = {
        threads: sequential(arguments.model, few, arguments.tokens, arguments.dtype, threads)
        for threads in arguments.threads
    }
    mine = best({threads: base for threads, (base, _) in pairs.items()})
    stock, one_by_one = best(batched), best(single)
    speed = mine["tokens_per_second"]
    return {
        "clients": arguments.clients,
        "experts": arguments.experts,
        **mine,
        "mixed": best({threads: mixed for threads, (_, mixed) in pairs.items()}),
        "transformers_serve": stock,
        "transformers_serve_without_batching": one_by_one,
        "sequential_tokens_per_second": {str(threads): round(found, 1) for threads, found in alone.items()},
        "same_beginning_as_transformers_serve": round(
            agreement(pairs[mine["threads"]][0], batched[stock["threads"]]), 3
        ),
        "throughput_vs_transformers_serve": round(speed / stock["tokens_per_second"], 3),
        "throughput_vs_transformers_serve_without_batching": round(speed / one_by_one["tokens_per_second"], 3),
        "throughput_vs_sequential": round(speed / max(alone.values()), 3),
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
    parser.add_argument("--experts", default="grouped_mm", help="model.experts of our service (default grouped_mm)")
    parser.add_argument("--dtype", default="bfloat16", help="of all of them (default bfloat16, as stored)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers to try (default 1 2)")
    arguments = parser.parse_args()
    arguments.requests = arguments.requests or 4 * arguments.clients
    with command_line():
        print_result(measure(arguments))


if __name__ == "__main__":
    main()
