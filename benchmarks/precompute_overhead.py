"""What precomputing teacher targets costs over a forward pass.

Claim: a worker of `nexus-ray precompute` reads text at 0.9 or more of the speed of a plain batched forward pass of the
same model on the same batches, `model(input_ids, attention_mask)`, which ends with the logits. The worker's pass runs
the decoder layers, the LM head a few positions at a time, encodes and writes Parquet; what closing and checksumming a
shard takes is spread over its batches. The passes alternate, batch by batch, in one process with one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _common import command_line, print_result

from nexus_ray.config import Config, load_config
from nexus_ray.console import progress
from nexus_ray.data.packing import Batch, batches, pack_shard
from nexus_ray.data.sources import list_shards
from nexus_ray.errors import ConfigError
from nexus_ray.modeling.loading import LoadedModel, load_base
from nexus_ray.targets.checksums import checksums
from nexus_ray.targets.writing.job import job_of_run
from nexus_ray.targets.writing.shard_file import writing_shard
from nexus_ray.targets.writing.teaching import EncodingTeacher

_WARM_UP_ROUNDS = 3
_MODES: dict[str, list[str]] = {
    "topk": [],
    "sampled": ["targets.mode=sampled"],
    "hidden": ["targets.mode=hidden"],
    "topk_and_routers": ["routers"],
}


def main() -> None:
    """Measure and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--model", type=Path, help="another model than the configuration's")
    parser.add_argument("--rounds", type=int, default=40, help="batches that the passes alternate on")
    arguments = parser.parse_args()
    if arguments.rounds <= _WARM_UP_ROUNDS:
        raise ConfigError(
            f"--rounds {arguments.rounds}: the first {_WARM_UP_ROUNDS} only warm up", "use --rounds 10 or more"
        )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        overrides = [f"run.directory={directory}"]
        overrides += [f"model.path={arguments.model}"] if arguments.model else []
        configs = {mode: configure(arguments.config, overrides, settings) for mode, settings in _MODES.items()}
        speeds, sizes = alternate(configs, Path(directory), arguments.rounds)
    ratios = {mode: speeds[mode] / speeds["plain"] for mode in _MODES}
    print_result(
        {
            "throughput_ratio": ratios["topk"],
            "throughput_ratios": ratios,
            "tokens_per_second": speeds,
            "bytes_per_token": sizes,
            "model": str(configs["topk"].model.path),
            "rounds": arguments.rounds - _WARM_UP_ROUNDS,
        }
    )


def configure(path: Path, overrides: list[str], settings: list[str]) -> Config:
    """The configuration, every source of it learning from stored targets."""
    mode, terms = [setting for setting in settings if "=" in setting], ["output_kl"]
    terms += ["router_kl"] if "routers" in settings else []
    sources = load_config(path, overrides).train.sources
    return load_config(
        path, [*overrides, *mode, *(f"train.sources.{name}.{term}=1" for name in sources for term in terms)]
    )


def alternate(configs: dict[str, Config], directory: Path, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Tokens a second of each pass over the same batches, and the bytes a token of each mode's shard."""
    config = configs["topk"]
    base = load_base(config.model)
    work = full_batches(config, base, rounds)
    shards = {mode: ExitStack() for mode in configs}
    passes: dict[str, Callable[[Batch], Any]] = {"plain": lambda batch: forward(base, batch)}
    passes |= {mode: worker_pass(base, each, directory / mode, shards[mode]) for mode, each in configs.items()}
    seconds: dict[str, list[float]] = defaultdict(list)
    with progress("alternate passes", rounds) as advance:
        for number, batch in enumerate(work):
            names = list(passes)
            first = number % len(names)
            for name in names[first:] + names[:first]:  # none is always first
                seconds[name].append(timed(passes[name], batch))
            advance(1)
    ends = {mode: timed(finish, shards[mode], directory / mode) / rounds for mode in configs}
    tokens = float(work[0].num_tokens.sum())
    speeds = {
        name: tokens / (median(values[_WARM_UP_ROUNDS:]) + ends.get(name, 0.0)) for name, values in seconds.items()
    }
    return speeds, {mode: (directory / mode).stat().st_size / (tokens * rounds) for mode in configs}


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def full_batches(config: Config, base: LoadedModel, count: int) -> list[Batch]:
    """The first whole batches of full sequences of the training text."""
    shards = list_shards(config.data, "train")
    length, size = config.data.sequence_length, config.targets.batch_sequences
    packed = chain.from_iterable(pack_shard(shard, base.tokenizer, length) for shard in shards)
    found = []
    for batch in batches((sequence for sequence in packed if sequence.num_tokens == length), size):
        if len(batch.num_tokens) == size:
            found.append(batch)
        if len(found) == count:
            return found
    raise ConfigError(f"the text has {len(found)} batches of {size} sequences", f"use --rounds {len(found)}")


def worker_pass(base: LoadedModel, config: Config, path: Path, stack: ExitStack) -> Callable[[Batch], None]:
    """What a worker does with a batch; its shard is closed with the stack."""
    job = job_of_run(config)
    teacher, random = EncodingTeacher(base, job.header), np.random.Generator(np.random.Philox(key=0))
    flags = {"output": job.header.output is not None, "router": job.header.router is not None}
    shard = stack.enter_context(writing_shard(path, job.header, "text", "0" * 16, **flags))
    return lambda batch: shard.add(batch, teacher.columns(batch, random, **flags))


def finish(shard: ExitStack, path: Path) -> None:
    """What a worker does when a shard has no more batches."""
    shard.close()
    checksums(path)


@torch.no_grad()
def forward(base: LoadedModel, batch: Batch) -> None:
    """One plain pass over a batch, with its logits; nothing recorded."""
    base.model(
        input_ids=torch.from_numpy(batch.input_ids).long(),
        attention_mask=torch.from_numpy(batch.valid).long(),
        use_cache=False,
    )


if __name__ == "__main__":
    with command_line():
        main()
