"""Claim: a step on packed weights takes at most half of PEFT's memory, at PEFT's speed.

One training step (forward, backward, clipping, AdamW; next-token cross-entropy on random tokens) of the shared experts
on packed MXFP4 weights, against LoRA of rank 8 by PEFT on the same checkpoint, which transformers dequantises to
bfloat16: on the attention (`all-linear`), and on all routed experts (`target_parameters`). OpenAI's recipe for
GPT-OSS is the first in every layer and the second in every eighth, so its cost lies between the two. LoRA runs with
transformers' eager and grouped experts. The headline ratios compare with whatever is best for a user of PEFT:
`memory_ratio` with the smallest peak of any of these settings, `throughput_ratio` with the highest speed of any.
`with_our_loss` lends PEFT this project's fused loss as well; what differs then is packed weights and what is trained.

Base, batch, sequence length, threads, gradient checkpointing and types (bfloat16 compute, float32 trained weights) are
the same. Each setting is a process of its own; a round runs all of them, and figures are medians over rounds. Memory
on a CPU is the peak of resident memory during the steps, that is anonymous memory plus the touched pages of mapped
files (`peak_anonymous_bytes` is the former alone); on a GPU it is what torch allocated there. A base of few layers
flatters us, because its first layer needs no backward pass of its experts, and PEFT, because the LM head costs both
the same: with `--layers 2 4`, `at_24_layers` adds the cost of a layer twenty more times. The last line is one JSON
object.

    pip install 'nexus-ray[peft]'
    python benchmarks/training_vs_peft.py --layers 2 4
    python benchmarks/training_vs_peft.py --model assets/tiny-gpt-oss
    python benchmarks/training_vs_peft.py --device cuda --layers 24 --sequences 8
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import MemoryPeak, command_line, print_result, release_free_memory
from _worker_step import CHECKPOINTS, WorkerSteps, make_checkpoint, make_overlay, step_config

from nexus_ray.config import Config
from nexus_ray.memory import bound_shape_caches

OURS = "shared_expert"
LOSSES = ("fused", "transformers")
_SHAPE, _SHAPE_LAYERS = "gpt-oss-20b", 24
_PEFT = [f"{adapters}-{experts}" for adapters in ("attention", "experts") for experts in ("grouped_mm", "eager")]
_FIGURES = ("seconds", "peak_bytes", "peak_anonymous_bytes", "weight_bytes", "trained_parameters")
Record = dict[str, Any]


def configuration(arguments: argparse.Namespace, model: Path) -> Config:
    """The run that all settings have in common."""
    sequences = arguments.sequences
    return step_config(
        model,
        [
            f"model.device={arguments.device}",
            f"resources={{workers: 1, cpus_per_worker: {arguments.threads}, gpus_per_worker: 0}}",
            f"data.sequence_length={arguments.length}",
            f"train.micro_batch_sequences={sequences}",
            f"train.gradient_checkpointing={str(arguments.checkpointing).lower()}",
            f"train.optimiser.name={arguments.optimiser}",
            f"train.sources={{domain: {{sequences_per_step: {sequences}, cross_entropy: 1.0}}}}",
        ],
    )


def measure(step: Callable[[], float], arguments: argparse.Namespace) -> Record:
    """Seconds (median) and peak memory of steps after a first one."""
    cuda = arguments.device == "cuda"
    losses, seconds = [step()], []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with MemoryPeak() as peak:
        for _ in range(arguments.steps):
            started = time.perf_counter()
            losses.append(step())  # a number, so that it has been computed
            seconds.append(time.perf_counter() - started)
    return {
        "seconds": statistics.median(seconds),
        "losses": losses,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else peak.resident,
        "peak_anonymous_bytes": peak.anonymous,
    }


def ours(arguments: argparse.Namespace, model: Path) -> dict[str, Record]:
    """The shared experts' steps."""
    config = configuration(arguments, model)
    with tempfile.TemporaryDirectory() as scratch:
        make_overlay(config, Path(scratch) / "overlay")
        worker = WorkerSteps(config, Path(scratch) / "overlay", arguments.device)
    trained = list(worker.parameters.values())
    fixed = {
        "weight_bytes": sum(p.nbytes for p in [*worker.student.model.parameters(), *trained]),
        "trained_parameters": sum(p.numel() for p in trained),
    }
    return {OURS: measure(lambda: worker.step()[0], arguments) | fixed}


def theirs(arguments: argparse.Namespace, model: Path) -> dict[str, Record]:
    """The steps of LoRA, with each loss."""
    from _peft_step import PeftSettings, PeftSteps

    bound_shape_caches()
    torch.set_num_threads(arguments.threads)
    adapters, experts = arguments.setting.split("-")
    settings = PeftSettings(adapters, experts, arguments.checkpointing, arguments.device)
    config = configuration(arguments, model)
    steps = PeftSteps(model, settings, config.train.optimiser.learning_rate)
    generator = torch.Generator().manual_seed(config.run.seed)
    shape = (arguments.sequences, arguments.length)
    ids = torch.randint(0, steps.model.config.vocab_size, shape, generator=generator).to(arguments.device)
    fixed = {"weight_bytes": steps.weight_bytes, "trained_parameters": sum(p.numel() for p in steps.parameters)}
    records = {}
    for loss in LOSSES:
        release_free_memory()
        step = functools.partial(steps.step, ids, fused_loss=loss == "fused")
        records[f"{arguments.setting}-{loss}"] = measure(step, arguments) | fixed
    return records


def in_own_process(arguments: argparse.Namespace, setting: str, model: Path) -> dict[str, Record]:
    """The records of one setting from a new process."""
    command = [sys.executable, __file__, "--setting", setting, "--model", str(model), "--device", arguments.device]
    command += [
        f"--{name}={getattr(arguments, name)}" for name in ("sequences", "length", "steps", "threads", "optimiser")
    ]
    command += [] if arguments.checkpointing else ["--no-checkpointing"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    records: dict[str, Record] = json.loads(output.splitlines()[-1])
    for name, record in records.items():
        tokens = arguments.sequences * arguments.length / record["seconds"]
        print(f"{model.name} {name:<36} {record['peak_bytes'] / 2**30:6.2f} GiB {tokens:8.1f} tokens/s", flush=True)
    return records


def settings_of(arguments: argparse.Namespace, model: Path, models: list[Path]) -> list[str]:
    """What to run on a model; LoRA on experts takes so much memory that it runs on the smallest alone."""
    return [OURS] + [name for name in _PEFT if model == models[0] or not name.startswith("experts")]


def compare(arguments: argparse.Namespace, model: Path, settings: list[str]) -> Record:
    """All settings on one model, and the ratios to PEFT's best."""
    rounds: list[dict[str, Record]] = []
    for _ in range(arguments.rounds):
        found: dict[str, Record] = {}
        for setting in settings:
            found |= in_own_process(arguments, setting, model)
        rounds.append(found)
    medians = {
        name: {figure: statistics.median(turn[name][figure] for turn in rounds) for figure in _FIGURES}
        for name in rounds[0]
    }
    return ratios(medians) | {"settings": medians}


def ratios(records: dict[str, Record]) -> Record:
    """Ours to the best of PEFT as it is, to the best of each kind of adapter, and to the best with our loss too."""
    peft = {name: record for name, record in records.items() if name != OURS}
    stock = {name: record for name, record in peft.items() if name.endswith(LOSSES[1])}
    kinds = sorted({name.split("-")[0] for name in stock})
    against = {
        kind: _ratio(records[OURS], [record for name, record in stock.items() if name.startswith(kind)])
        for kind in kinds
    }
    against["with_our_loss"] = _ratio(records[OURS], list(peft.values()))
    return _ratio(records[OURS], list(stock.values())) | {"against": against}


def _ratio(record: Record, others: list[Record]) -> Record:
    return {
        "memory_ratio": record["peak_bytes"] / min(other["peak_bytes"] for other in others),
        "throughput_ratio": min(other["seconds"] for other in others) / record["seconds"],
    }


def extrapolate(fewer: Record, more: Record, layers: tuple[int, int]) -> Record:
    """The ratios at the shape's own number of layers, when each layer costs what the difference of two models says."""
    extra = (_SHAPE_LAYERS - layers[1]) / (layers[1] - layers[0])
    records = {
        name: {
            figure: record[figure] + extra * (record[figure] - fewer["settings"][name][figure])
            for figure in ("seconds", "peak_bytes")
        }
        for name, record in more["settings"].items()
    }
    return ratios(records) | {"settings": records}


def run(arguments: argparse.Namespace) -> Record:
    """All models; the headline is that of the largest."""
    models = [arguments.model] if arguments.model else []
    for layers in [] if arguments.model else arguments.layers:
        models.append(arguments.directory / f"{_SHAPE}-{layers}-layers")
        make_checkpoint(_SHAPE, layers, models[-1])
    results = [compare(arguments, model, settings_of(arguments, model, models)) for model in models]
    headline = {key: results[-1][key] for key in ("memory_ratio", "throughput_ratio")}
    described = {
        name: getattr(arguments, name) for name in ("device", "sequences", "length", "threads", "checkpointing")
    }
    by_model = {model.name: result for model, result in zip(models, results, strict=True)}
    result = {"benchmark": "training_vs_peft", **headline, **described, "by_model": by_model}
    if len(results) > 1:
        result["at_24_layers"] = extrapolate(results[-2], results[-1], tuple(arguments.layers[-2:]))
    return result


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4], help="of GPT-OSS 20B's true shape, ascending")
    parser.add_argument("--model", type=Path, help="another base")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process, after a first one")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--optimiser", choices=["adamw", "adamw_8bit"], default="adamw", help="of the shared experts")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--directory", type=Path, default=CHECKPOINTS, help="of checkpoints")
    parser.add_argument("--setting", choices=[OURS, *_PEFT], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with command_line():
        if arguments.setting:
            print_result((ours if arguments.setting == OURS else theirs)(arguments, arguments.model))
        else:
            print_result(run(arguments))


if __name__ == "__main__":
    main()
