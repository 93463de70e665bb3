"""The HTTP service when things go wrong: a killed replica, too much load, clients that go away or only hold on.

    python benchmarks/serve_faults.py

Claims: `lost_requests` is 0: a replica of two is killed (SIGKILL) under load, and every request of the `openai` client,
with the retries that it makes by itself, is answered in the end; more requests than the queue holds get 429 with
Retry-After, and memory does not grow with how often that happens; work for a stream that nobody reads any more stops
within a second; idle connections and a reader that does not read keep nobody else waiting. Ends with one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from _common import command_line, print_result
from _servers import ROOT, free_port, our_command, run_of, server

from nexus_ray.errors import NexusError

_REPLICA = "ServeReplica:nexus-ray:chat"
_SLOW_READER_BYTES = 1 << 16  # of its buffers: the server cannot send much ahead
_SLOW_READER_SECONDS = 20  # before it reads
_TIMEOUT = httpx.Timeout(300)


def chat(tokens: int, **changes: Any) -> dict[str, Any]:
    """A request."""
    messages = [{"role": "user", "content": "Good morrow, who goes there?"}]
    return {"model": "bard", "messages": messages, "max_tokens": tokens, "temperature": 0} | changes


def replicas() -> list[psutil.Process]:
    """The replicas' processes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if _REPLICA in " ".join(process.info["cmdline"] or ()):
                found.append(process)
    return found


def service_bytes(root: psutil.Process) -> int:
    """Anonymous memory of everything that a process started."""
    total = 0
    for process in root.children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            status = Path(f"/proc/{process.pid}/status").read_text()
            total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    return total


async def killed_replica(address: str, requests: int, clients: int) -> dict[str, Any]:
    """Load with the `openai` client while one of two replicas is killed."""
    before = replicas()
    if len(before) != 2:
        raise NexusError(f"found {len(before)} replicas, not 2")
    lost: list[str] = []
    waiting = iter(range(requests))
    answered = 0

    async def work(api: openai.AsyncOpenAI) -> None:
        nonlocal answered
        for _ in waiting:
            try:
                await api.chat.completions.create(**chat(48))
                answered += 1
            except openai.OpenAIError as error:
                lost.append(repr(error)[:200])
            if answered == requests // 4 and victim.is_running():
                victim.send_signal(signal.SIGKILL)

    victim = before[0]
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=_TIMEOUT) as api:
        await asyncio.gather(*(work(api) for _ in range(clients)))
    began = time.monotonic()
    while len(replicas()) < 2 and time.monotonic() - began < 120:
        await asyncio.sleep(0.5)
    return {
        "requests": requests,
        "lost_requests": len(lost),
        "first_loss": lost[0] if lost else None,
        "replaced": len(replicas()) == 2,
    }


async def overload(address: str, root: psutil.Process, waves: int, at_once: int) -> dict[str, Any]:
    """Waves of more requests than the queue holds, without retries."""
    limits = httpx.Limits(max_connections=at_once)
    statuses: Counter[int] = Counter()
    told, memory = True, []
    async with httpx.AsyncClient(base_url=address, timeout=_TIMEOUT, limits=limits) as client:

        async def ask() -> None:
            nonlocal told
            response = await client.post("/v1/chat/completions", json=chat(16))
            statuses[response.status_code] += 1
            if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
                told &= "retry-after" in response.headers

        for _ in range(waves):
            await asyncio.gather(*(ask() for _ in range(at_once)))
            memory.append(service_bytes(root))
    quarter = len(memory) // 4
    grown = statistics.median(memory[-quarter:]) - statistics.median(memory[quarter : 2 * quarter])
    return {
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "refusals_say_when_to_come_back": told,
        "memory_growth_mb": round(grown / 1e6, 1),
        "memory_mb": round(memory[-1] / 1e6),
    }


async def metric(client: httpx.AsyncClient, name: str) -> float:
    """A metric of the one replica."""
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise NexusError(f"no metric {name}")


async def abandoned(address: str, streams: int) -> dict[str, Any]:
    """Streams that are closed after their first text: how long the engine goes on, and how far."""
    async with httpx.AsyncClient(base_url=address, timeout=_TIMEOUT) as client:
        before = await metric(client, "nexus_ray_engine_generated_tokens")

        async def begin_and_leave() -> None:
            async with client.stream("POST", "/v1/chat/completions", json=chat(512, stream=True)) as response:
                async for line in response.aiter_lines():
                    if '"content":"' in line and '"content":""' not in line:
                        return

        await asyncio.gather(*(begin_and_leave() for _ in range(streams)))
        left = time.monotonic()
        while await metric(client, "nexus_ray_engine_running") > 0:
            if time.monotonic() - left > 60:
                break
            await asyncio.sleep(0.02)
        stopped = time.monotonic() - left
        generated = await metric(client, "nexus_ray_engine_generated_tokens") - before
        await asyncio.sleep(1)
        later = await metric(client, "nexus_ray_engine_generated_tokens") - before
    return {
        "streams": streams,
        "stopped_after_s": round(stopped, 3),
        "tokens_generated": int(generated),
        "tokens_generated_a_second_later": int(later),
        "tokens_if_read_to_the_end": streams * 512,
    }


async def holding_on(address: str, connections: int) -> dict[str, Any]:
    """Idle connections, and a reader that does not read for long: what another client sees, and what it gets itself."""
    host, port = address.removeprefix("http://").split(":")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, connections + 1000), hard))
    idle = []
    for number in range(connections):
        try:
            idle.append(await asyncio.wait_for(asyncio.open_connection(host, int(port)), 10))
        except (OSError, TimeoutError) as error:
            raise NexusError(f"connection {number + 1} was refused: {error}", "see `ulimit -Hn`") from error
    body = json.dumps(chat(512, stream=True, n=12, logprobs=True, top_logprobs=20)).encode()
    slow = socket.create_connection((host, int(port)))
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_READER_BYTES)
    reader, writer = await asyncio.open_connection(sock=slow, limit=_SLOW_READER_BYTES)
    fields = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    writer.write("\r\n".join([*fields, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    async with httpx.AsyncClient(base_url=address, timeout=_TIMEOUT) as client:
        began = time.monotonic()
        response = await client.post("/v1/chat/completions", json=chat(16))
        seconds = time.monotonic() - began
        await asyncio.sleep(_SLOW_READER_SECONDS)
        unread = await asyncio.wait_for(reader.read(), _TIMEOUT.read)
    for held in [writer, *(writer for _, writer in idle)]:
        held.close()
        with contextlib.suppress(OSError):
            await held.wait_closed()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return {
        "idle_connections": len(idle),
        "status_beside_them": response.status_code,
        "seconds_beside_them": round(seconds, 3),
        "slow_reader_mb": round(len(unread) / 1e6, 1),
        "slow_reader_got_all": b"data: [DONE]" in unread[-100:],
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two replicas for the kill, then one for the rest."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run = run_of(folder, arguments.model, arguments.overlay, "bfloat16")
        port = free_port()
        with server(our_command(port, [*run, "serve.replicas=2"]), port, "/healthz", folder / "two.log", 1) as at:
            killed = asyncio.run(killed_replica(at, arguments.requests, arguments.clients))
        port = free_port()
        limits = [f"serve.max_concurrent_requests={arguments.queue}", "resources.cpus_per_worker=2"]
        with server(our_command(port, [*run, *limits]), port, "/healthz", folder / "one.log", 2) as at:
            root = psutil.Process(os.getpid())
            overloaded = asyncio.run(overload(at, root, arguments.waves, arguments.at_once))
            left = asyncio.run(abandoned(at, 8))
            held = asyncio.run(holding_on(at, arguments.idle))
    return {
        "lost_requests": killed["lost_requests"],
        "killed_replica": killed,
        "overload": overloaded,
        "abandoned_streams": left,
        "holding_on": held,
    }


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=160, help="while a replica is killed (default 160)")
    parser.add_argument("--clients", type=int, default=16, help="of these at one time (default 16)")
    parser.add_argument("--queue", type=int, default=16, help="serve.max_concurrent_requests then (default 16)")
    parser.add_argument("--waves", type=int, default=24, help="of overload (default 24)")
    parser.add_argument("--at-once", type=int, default=200, help="requests of a wave (default 200)")
    parser.add_argument("--idle", type=int, default=10_000, help="idle connections (default 10,000)")
    parser.add_argument(
        "--model", type=Path, default=ROOT / "assets" / "tiny-gpt-oss", help="default: the embedded one"
    )
    parser.add_argument("--overlay", type=Path, default=ROOT / "runs" / "demo" / "overlay", help="of `make demo`")
    arguments = parser.parse_args()
    with command_line():
        print_result(measure(arguments))


if __name__ == "__main__":
    main()
