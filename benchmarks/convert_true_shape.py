"""Adds shared experts to a GPT-OSS checkpoint of true shape and measures time and memory of the real command.

    python benchmarks/convert_true_shape.py --shape gpt-oss-120b --init pca_top24
    python benchmarks/convert_true_shape.py --shape gpt-oss-20b --init pca_top24 --directory build/convert --keep

Real: the command (`python -m nexus_ray convert CONFIG` in a process of its own), the checkpoint's names, shapes and
types, and the bytes read and written. Made up: the weights (benchmarks/make_checkpoint.py; experts that are not
selected are holes of sparse files) and the router probabilities from which the real statistics and selection code
ranks the experts. It proves size and time, not quality.

`peak_rss_bytes` is the kernel's high-water mark of the command's process (VmHWM, read every 10 ms; ru_maxrss would
start at what the parent held). The base counts as unchanged when size and SHA-256 of every file are the same before
and after; holes of sparse files go into the hash as their extent, not as zeros. The page cache of the base is dropped
before the command; `reads_cold` says whether the kernel then really read from the disk. The last line printed is one
JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _common import command_line, print_result
from _true_shape import SHAPES, TrueShape

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.config import SelectSection
from nexus_ray.errors import ConfigError, NexusError
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.packed_experts import ExpertNorms
from nexus_ray.router.accumulate import moments_of_logits
from nexus_ray.router.artefact import Description, RouterStatistics
from nexus_ray.selection.selection import Selection, select_experts
from nexus_ray.storage import make_directory, write_json, write_text

_HERE = Path(__file__).parent
_SOURCE = "domain"
_SEQUENCES, _LENGTH = 16, 128
_HASH_BYTES = 1 << 24
_SAMPLE_SECONDS = 0.01
_COLD_SHARE = 0.9  # of the experts' bytes: the rest may be read ahead by the planning of the command itself


@dataclass(frozen=True)
class Measured:
    """A finished process.

    Attributes:
        seconds: wall clock from start to exit.
        peak_rss_bytes: the kernel's high-water mark of resident memory, read every 10 ms.
        peak_anonymous_bytes: largest anonymous memory, sampled every 10 ms.
        disk_bytes: bytes that the kernel fetched from the disk for it.
    """

    seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    disk_bytes: int


def ranking_of(initialisation: str) -> tuple[str, int]:
    """(select.method, experts a layer) whose selection holds every expert that a method reads."""
    match = re.fullmatch(r"(pca|aligned|reap)_top([1-9]\d*)", initialisation)
    if match:
        return ("reap" if match[1] == "reap" else "pca"), int(match[2])
    counts = {"zero": 1, "random": 1, "top1": 1, "top1_zero": 1, "top4_average": 4}
    if initialisation not in counts:
        raise ConfigError(
            f"--init {initialisation} is not measured here",
            f"use pca_topN, aligned_topN, reap_topN, {', '.join(counts)}",
        )
    return "usage", counts[initialisation]


def synthetic_statistics(shape: TrueShape) -> RouterStatistics:
    """Statistics of random router logits in which every layer prefers some experts."""
    generator = torch.Generator().manual_seed(0)
    preference = torch.randn(shape.layers, shape.experts, generator=generator)
    noise = torch.randn(_SEQUENCES, _LENGTH, shape.layers, shape.experts, generator=generator)
    logits = noise + preference
    top = logits.flatten(0, 1).topk(shape.experts_per_token, dim=-1)
    norms = [ExpertNorms(top.indices[:, i], top.values[:, i].softmax(dim=-1)) for i in range(shape.layers)]
    valid, half = np.ones((_SEQUENCES, _LENGTH), bool), np.arange(_SEQUENCES) % 2
    moments = moments_of_logits(logits, valid, half, shape.experts_per_token, norms)
    description = Description(
        base_fingerprint="made before the checkpoint",
        tokenizer_sha256="none",
        sequence_length=_LENGTH,
        layers=shape.layers,
        experts=shape.experts,
        experts_per_token=shape.experts_per_token,
        tokens={_SOURCE: moments.tokens},
    )
    return RouterStatistics(description, {_SOURCE: moments})


def prepare(directory: Path, shape: str, initialisation: str) -> tuple[Path, Path]:
    """Make the base (unless it is there), the selection and the configuration; return (base, configuration)."""
    method, count = ranking_of(initialisation)
    section = SelectSection.model_validate({"method": method, "top_k": count})
    selection = select_experts(synthetic_statistics(SHAPES[shape]), section, (_SOURCE,))
    base, run = directory / f"{shape}-{method}-{count}", RunLayout(directory / "run")
    if not base.exists():
        make_checkpoint(base, shape, selection, directory / "selection.json")
    selection.model_copy(update={"base_fingerprint": fingerprint(base)}).save(run.selection)
    write_text(directory / "text.txt", "The statistics of this run were made up; this text is never read.\n")
    write_json(directory / "config.yaml", configuration(directory, base, initialisation, count))  # JSON is YAML
    return base, directory / "config.yaml"


def configuration(directory: Path, base: Path, initialisation: str, count: int) -> dict[str, object]:
    """A run that only `convert` is asked of."""
    return {
        "run": {"directory": str(directory / "run")},
        "model": {"path": str(base)},
        "data": {"sources": {_SOURCE: {"train": str(directory / "text.txt")}}},
        "select": {"top_k": count},
        "convert": {"initialisation": initialisation},
        "train": {"sources": {_SOURCE: {"sequences_per_step": 1, "cross_entropy": 1.0}}},
    }


def make_checkpoint(base: Path, shape: str, selection: Selection, path: Path) -> None:
    """Run the checkpoint maker in a process of its own: its memory must not count as the command's."""
    selection.save(path)
    maker = [sys.executable, str(_HERE / "make_checkpoint.py"), "--shape", shape, "--output", str(base)]
    subprocess.run([*maker, "--selection", str(path)], check=True, stdout=sys.stderr)


def digests(base: Path) -> dict[str, str]:
    """{file name: SHA-256 of its size and filled ranges}."""
    files = sorted(path for path in base.iterdir() if path.is_file())
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((path.name for path in files), pool.map(digest_filled, files), strict=True))


def digest_filled(path: Path) -> str:
    """SHA-256 of a file's size and of place, length and bytes of each range that is not a hole."""
    hasher = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb", buffering=0) as file:
        for start, stop in filled_ranges(file.fileno(), path.stat().st_size):
            hasher.update(f"[{start},{stop})".encode())
            for offset in range(start, stop, _HASH_BYTES):
                hasher.update(os.pread(file.fileno(), min(_HASH_BYTES, stop - offset), offset))
    return hasher.hexdigest()


def filled_ranges(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of each part of a file that is not a hole."""
    offset = 0
    while offset < size:
        try:
            offset = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole up to the end
            return
        stop = os.lseek(descriptor, offset, os.SEEK_HOLE)
        yield offset, stop
        offset = stop


def drop_page_cache(base: Path) -> None:
    """Ask the kernel to forget the base's pages."""
    for path in base.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(command: list[str]) -> Measured:
    """Run a command to its end and watch its memory.

    Raises:
        NexusError: it failed.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    anonymous = resident = 0
    options = os.WEXITED | os.WNOWAIT | os.WNOHANG
    while os.waitid(os.P_PID, process.pid, options) is None:
        anonymous = max(anonymous, proc_field(process.pid, "status", "RssAnon") * 1024)
        resident = max(resident, proc_field(process.pid, "status", "VmHWM") * 1024)
        time.sleep(_SAMPLE_SECONDS)
    seconds = time.monotonic() - started
    fetched = proc_field(process.pid, "io", "read_bytes")
    if process.wait():
        raise NexusError(f"{' '.join(command)} ended with exit code {process.returncode}")
    return Measured(seconds, resident, anonymous, fetched)


def proc_field(process: int, file: str, field: str) -> int:
    """A number of /proc/PROCESS/FILE; 0 where the process does not have it any more."""
    match = re.search(rf"^{field}:\s+(\d+)", Path(f"/proc/{process}/{file}").read_text(), re.MULTILINE)
    return int(match[1]) if match else 0


def benchmark(directory: Path, shape: str, initialisation: str) -> dict[str, object]:
    """Prepare, convert, compare; returns the result line."""
    base, config = prepare(directory, shape, initialisation)
    before = digests(base)
    drop_page_cache(base)
    command = [sys.executable, "-m", "nexus_ray", "convert", str(config), "--force"]
    measured = measure(command)
    run = RunLayout(directory / "run")
    record = json.loads(run.conversion.read_text(encoding="utf-8"))
    bytes_read = sum(layer["bytes_read"] for layer in record["layers"])
    return {
        "shape": shape,
        "init": initialisation,
        "seconds": round(measured.seconds, 1),
        "convert_seconds": record["seconds"],
        "peak_rss_bytes": measured.peak_rss_bytes,
        "peak_anonymous_bytes": measured.peak_anonymous_bytes,
        "overlay_bytes": sum(path.stat().st_size for path in run.initial_overlay.iterdir()),
        "bytes_read": bytes_read,
        "disk_bytes_read": measured.disk_bytes,
        "reads_cold": measured.disk_bytes >= _COLD_SHARE * bytes_read,
        "base_unchanged": digests(base) == before,
        "cores": len(os.sched_getaffinity(0)),
    }


@contextmanager
def working_directory(directory: Path | None, keep: bool) -> Iterator[Path]:
    """The directory named, or a temporary one below it that is removed at the end."""
    if directory is not None:
        make_directory(directory)
    if directory is not None and keep:
        yield directory.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="convert-true-shape-", dir=directory) as temporary:
        yield Path(temporary)


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shape", required=True, choices=list(SHAPES))
    parser.add_argument("--init", default="pca_top24", help="convert.initialisation (default pca_top24)")
    parser.add_argument("--directory", type=Path, help="where base and overlay go; default: a temporary directory")
    parser.add_argument("--keep", action="store_true", help="keep them in --directory, and use a base that is there")
    arguments = parser.parse_args()
    with command_line(), working_directory(arguments.directory, arguments.keep) as directory:
        print_result(benchmark(directory, arguments.shape, arguments.init))


if __name__ == "__main__":
    main()
