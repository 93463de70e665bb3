"""Claim: the chunked losses take at most a fifth of the dense losses' memory at a vocabulary of 201,088.

Next-token cross-entropy, alone and with the divergence from each kind of teacher target, forward and backward: once by
`training/losses/chunked.py`, once as plain losses on all logits by autograd. Each measurement is a process of its own,
so that one allocator's leftovers do not hide the other's needs; memory is anonymous and beyond the model's head, the
hidden states and the targets. Both must agree: the largest differences of loss and gradient are printed. Dense losses
of hidden targets are measured on half the positions, since on all of them they need more than 20 GiB: their ratio is
then an upper bound. The last line is one JSON object.

    python benchmarks/loss_memory.py
    python benchmarks/loss_memory.py --positions 512 --vocabulary 50000 --hidden 768
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import MemoryPeak, command_line, print_result
from safetensors.torch import load_file, save_file
from torch import Tensor

from nexus_ray.targets.teacher import HiddenTargets, OutputTargets, SampledTargets, TopKTargets
from nexus_ray.training.losses.chunked import output_losses

CASES = ("cross_entropy", "topk", "sampled", "hidden")
KEPT, DRAWS = 64, 12
Losses = Callable[[Tensor, Tensor, Tensor, OutputTargets | None, int], Tensor]


def chunked(hidden: Tensor, head: Tensor, next_ids: Tensor, teacher: OutputTargets | None, count: int) -> Tensor:
    """Sum of the terms divided by `count`, with the project's losses."""
    terms = ("cross_entropy", "output_kl") if teacher else ("cross_entropy",)
    return output_losses(hidden, head, next_ids, teacher, dict.fromkeys(terms, 1 / count))[0]


def dense(hidden: Tensor, head: Tensor, next_ids: Tensor, teacher: OutputTargets | None, count: int) -> Tensor:
    """The same on logits of all positions, by autograd."""
    log_q = F.log_softmax(F.linear(hidden, head).float(), dim=-1)
    total = F.nll_loss(log_q, next_ids, reduction="sum")
    if teacher is not None:
        total = total + dense_divergence(log_q, head, teacher).sum()
    return total / count


def dense_divergence(log_q: Tensor, head: Tensor, teacher: OutputTargets) -> Tensor:
    """[positions] forward KL of the student's log-probabilities [positions, V]."""
    if isinstance(teacher, HiddenTargets):
        log_p = F.log_softmax(F.linear(teacher.hidden, head).float(), dim=-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    kept = log_q.gather(-1, teacher.ids)
    if isinstance(teacher, SampledTargets):
        return -teacher.entropy - kept.mean(-1)
    rest = (1 - kept.exp().sum(-1)).clamp(min=1e-6).log()
    of_kept = (teacher.log_probs.exp() * (teacher.log_probs - kept)).sum(-1)
    return of_kept + teacher.tail_log_prob.exp() * (teacher.tail_log_prob - rest)


def make_targets(case: str, hidden: Tensor, vocabulary: int, generator: torch.Generator) -> OutputTargets | None:
    """Random targets; hidden ones near the student's."""
    positions = len(hidden)
    if case == "hidden":
        return HiddenTargets(hidden + 0.3 * torch.randn(hidden.shape, generator=generator).to(hidden.dtype))
    if case == "sampled":
        ids = torch.randint(0, vocabulary, (positions, DRAWS), generator=generator)
        return SampledTargets(ids, torch.rand(positions, generator=generator))
    if case == "topk":
        values = torch.randn(positions, KEPT + 1, generator=generator).mul(2).log_softmax(-1)
        ids = torch.randint(0, vocabulary - KEPT, (positions, 1), generator=generator) + torch.arange(KEPT)
        return TopKTargets(ids, values[:, :-1], values[:, -1])
    return None


def measure(arguments: argparse.Namespace, positions: int, losses: Losses) -> dict[str, Any]:
    """Loss, gradient, seconds and transient bytes of one forward and backward pass over `positions`."""
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(arguments.vocabulary, arguments.hidden, generator=generator).mul_(0.05).bfloat16()
    states = torch.randn(arguments.positions, arguments.hidden, generator=generator).bfloat16()
    next_ids = torch.randint(0, arguments.vocabulary, (arguments.positions,), generator=generator)
    teacher = make_targets(arguments.case, states, arguments.vocabulary, generator)
    if teacher is not None:
        teacher = type(teacher)(*(values[:positions].clone() for values in vars(teacher).values()))
    hidden = states[:positions].clone().requires_grad_(True)
    with MemoryPeak() as peak:
        started = time.perf_counter()
        loss = losses(hidden, head, next_ids[:positions], teacher, arguments.positions)
        loss.backward()
        seconds = time.perf_counter() - started
    assert hidden.grad is not None
    save_file({"gradient": hidden.grad}, arguments.gradient)
    return {"loss": loss.item(), "seconds": seconds, "peak_bytes": peak.transient}


def in_own_process(arguments: argparse.Namespace, case: str, kind: str, positions: int, gradient: Path) -> Any:
    """`measure` in a new process."""
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("positions", "vocabulary", "hidden", "threads")]
    command = [sys.executable, __file__, *sizes, "--case", case, "--kind", kind]
    command += ["--measured-positions", str(positions), "--gradient", str(gradient)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def compare(arguments: argparse.Namespace, case: str, directory: Path) -> dict[str, Any]:
    """Both ways of one case."""
    count = arguments.positions
    dense_count = count // 2 if case == "hidden" else count
    ours, theirs = directory / "chunked.safetensors", directory / "dense.safetensors"
    found = in_own_process(arguments, case, "chunked", count, ours)
    reference = in_own_process(arguments, case, "dense", dense_count, theirs)
    gradients = [load_file(path)["gradient"][:dense_count].double() for path in (ours, theirs)]
    same = found if dense_count == count else in_own_process(arguments, case, "chunked", dense_count, ours)
    result = {
        "peak_ratio": found["peak_bytes"] / reference["peak_bytes"],
        "chunked_peak_bytes": found["peak_bytes"],
        "dense_peak_bytes": reference["peak_bytes"],
        "dense_positions": dense_count,
        "chunked_seconds": round(found["seconds"], 2),
        "dense_seconds": round(reference["seconds"], 2),
        "loss_difference": abs(same["loss"] - reference["loss"]) / abs(reference["loss"]),
        "gradient_difference": float((gradients[0] - gradients[1]).norm() / gradients[1].norm()),
    }
    print(
        f"{case:<14} chunked {found['peak_bytes'] / 2**20:>9,.0f} MiB {found['seconds']:>7.1f} s   dense "
        f"{reference['peak_bytes'] / 2**20:>9,.0f} MiB {reference['seconds']:>7.1f} s ({dense_count} positions)   "
        f"ratio {result['peak_ratio']:.3f}",
        flush=True,
    )
    return result


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases, and the worst of them."""
    with tempfile.TemporaryDirectory() as scratch:
        results = {case: compare(arguments, case, Path(scratch)) for case in CASES}
    worst = {
        key: max(result[key] for result in results.values())
        for key in ("peak_ratio", "loss_difference", "gradient_difference")
    }
    sizes = {name: getattr(arguments, name) for name in ("positions", "vocabulary", "hidden", "threads")}
    return {"benchmark": "loss_memory", **worst, **sizes, "cases": results}


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=201_088)
    parser.add_argument("--hidden", type=int, default=2880)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=["chunked", "dense"], help=argparse.SUPPRESS)
    parser.add_argument("--measured-positions", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--gradient", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with command_line():
        if arguments.case:
            losses = chunked if arguments.kind == "chunked" else dense
            print_result(measure(arguments, arguments.measured_positions, losses))
        else:
            print_result(run(arguments))


if __name__ == "__main__":
    main()
