"""Claim: nexus-ray unpacks MXFP4 on a CPU at least 8 times as fast as transformers, to the same bits.

Both unpack the same experts of GPT-OSS 20B shape to bfloat16, in turns, so that a busy machine slows both alike;
the figures are medians. transformers' function ends with a transposition, because its model wants the other layout;
`speedup_in_their_layout` is what is left when nexus-ray's result is transposed too, `speedup_into_one_buffer` what
training gets, which needs one expert at a time. The last line is one JSON object.

    python benchmarks/dequantize.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from _common import MemoryPeak, command_line, print_result
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nexus_ray.checkpoints.mxfp4 import BLOCK, dequantise

_ROWS, _GROUPS, _BLOCK_BYTES = 5760, 90, 16  # gate_up_proj of one GPT-OSS expert
_NAN_SCALE = 255
Unpack = Callable[[Tensor, Tensor], Tensor]


def ours(blocks: Tensor, scales: Tensor) -> Tensor:
    """[experts, rows, columns] bfloat16."""
    return dequantise(blocks, scales, torch.bfloat16)


def ours_in_their_layout(blocks: Tensor, scales: Tensor) -> Tensor:
    """[experts, columns, rows] bfloat16."""
    return ours(blocks, scales).transpose(1, 2).contiguous()


def ours_into_one_buffer(blocks: Tensor, scales: Tensor) -> Tensor:
    """The same into one reused buffer, as training does; only the last expert is kept."""
    buffer = torch.empty(blocks.shape[1], blocks.shape[2] * BLOCK, dtype=torch.bfloat16)
    for block, scale in zip(blocks, scales, strict=True):
        dequantise(block, scale, torch.bfloat16, buffer)
    return buffer


def theirs(blocks: Tensor, scales: Tensor) -> Tensor:
    """[experts, columns, rows] bfloat16, as transformers' model wants it."""
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)


def largest_difference(left: Tensor, right: Tensor) -> float:
    """Largest absolute difference; equal infinities differ by 0, a NaN on either side gives infinity."""
    left, right = left.float(), right.float()
    if left.isnan().any() or right.isnan().any():
        return float("inf")
    return float(torch.where(left == right, 0.0, (left - right).abs()).max())


def every_byte_and_scale() -> tuple[Tensor, Tensor]:
    """All 256 bytes under each scale byte but NaN's: blocks [1, 255, 16, 16] and scales [1, 255, 16]."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, _NAN_SCALE, 16, 16)
    scales = torch.arange(_NAN_SCALE, dtype=torch.uint8).view(1, _NAN_SCALE, 1).expand(1, _NAN_SCALE, 16)
    return blocks.contiguous(), scales.contiguous()


def random_experts(experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Packed experts of random bytes with scales around 2^-7."""
    generator = torch.Generator().manual_seed(seed)
    shape = (experts, _ROWS, _GROUPS)
    blocks = torch.randint(0, 256, (*shape, _BLOCK_BYTES), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(118, 123, shape, dtype=torch.uint8, generator=generator)


def seconds_of(unpack: Unpack, blocks: Tensor, scales: Tensor) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    unpack(blocks, scales)
    return time.perf_counter() - started


def transient_bytes(unpack: Unpack, blocks: Tensor, scales: Tensor) -> int:
    """Memory one call takes at its peak beyond its inputs and its result."""
    with MemoryPeak() as peak:
        result = unpack(blocks, scales)
    return peak.transient - result.numel() * result.element_size()


def measure(experts: int, repeats: int, seed: int) -> dict[str, float]:
    """All figures of the result line."""
    blocks, scales = random_experts(experts, seed)
    difference = max(
        largest_difference(ours_in_their_layout(*pair), theirs(*pair))
        for pair in (every_byte_and_scale(), (blocks, scales))
    )
    transient = {unpack: transient_bytes(unpack, blocks, scales) for unpack in (ours, theirs)}
    seconds: dict[Unpack, list[float]] = {f: [] for f in (ours, theirs, ours_in_their_layout, ours_into_one_buffer)}
    for _ in range(repeats):
        for unpack, times in seconds.items():
            times.append(seconds_of(unpack, blocks, scales))
    median = {unpack: statistics.median(times) for unpack, times in seconds.items()}
    gparams = blocks.numel() * 2 / 1e9
    return {
        "speedup_vs_transformers": round(median[theirs] / median[ours], 2),
        "speedup_in_their_layout": round(median[theirs] / median[ours_in_their_layout], 2),
        "speedup_into_one_buffer": round(median[theirs] / median[ours_into_one_buffer], 2),
        "max_abs_difference": difference,
        "gparams_per_second": round(gparams / median[ours], 3),
        "gparams_per_second_into_one_buffer": round(gparams / median[ours_into_one_buffer], 3),
        "transformers_gparams_per_second": round(gparams / median[theirs], 3),
        "transient_bytes": transient[ours],
        "transformers_transient_bytes": transient[theirs],
        "experts": experts,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--experts", type=int, default=4, help="experts unpacked by one call (default 4)")
    parser.add_argument("--repeats", type=int, default=9, help="calls of each kind (default 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random bytes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with command_line():
        print_result(measure(arguments.experts, arguments.repeats, arguments.seed))


if __name__ == "__main__":
    main()
