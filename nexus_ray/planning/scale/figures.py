"""The per-unit figures of the scale model, each with what it is: measured here, exact, published elsewhere, assumed.

What was measured here is the best of eight runs on two cores of a virtual machine: other work kept it busy during most
of them, and the worst took ten times as long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["measured here", "exact", "published elsewhere", "assumed"]
_MB, _GB = 1e6, 1e9
_MILLION = 1e6
_LIMITS = "`benchmarks/driver_limits.py`"


@dataclass(frozen=True)
class Figure:
    """One number of the model.

    Attributes:
        what: in words.
        value: in `unit`.
        unit: of the value.
        kind: where it comes from.
        source: the command, the place in the code, or the publication.
    """

    what: str
    value: float
    unit: str
    kind: Kind
    source: str


FIGURES: list[Figure] = []


def _figure(what: str, value: float, unit: str, kind: Kind, source: str, scale: float = 1.0) -> float:
    """Note a figure; returns `value` x `scale`, in seconds, bytes or operations."""
    FIGURES.append(Figure(what, value, unit, kind, source))
    return value * scale


# Arithmetic on GPUs. Nothing here was run on one.
UTILISATION = _figure(
    "share of the dense bf16 speed that large products reach",
    0.25,
    "of peak",
    "assumed",
    "between the shares that NeMo Automodel's published speeds mean, see below",
)
LAUNCH = _figure(
    "host time to launch a kernel from eager PyTorch", 5, "us", "assumed", "usual order of magnitude", 1e-6
)
PCIE = _figure("copying between a GPU and its host", 10, "GB/s", "assumed", "PCIe 4.0 x16, a third of its peak", _GB)
EXPERT_KERNELS_FORWARD = _figure(
    "kernels of one packed expert, forward", 46, "kernels", "exact", "counted by `tests/planning/test_scale_speed.py`"
)
EXPERT_KERNELS_BACKWARD = _figure("the same, backward", 77, "kernels", "exact", "the same")
LAYER_KERNELS_FORWARD = _figure("kernels of a layer beside its experts, forward", 85, "kernels", "exact", "the same")
LAYER_KERNELS_BACKWARD = _figure("the same, backward", 115, "kernels", "exact", "the same")
UNPACK_BYTES = _figure(
    "memory traffic of unpacking one weight and multiplying with it",
    10.5,
    "bytes",
    "exact",
    "`checkpoints/mxfp4.py`: 0.5 read, indices 1 + 1, looked up 2, scaled 2 + 2, read 2",
)
UPDATE_BYTES = _figure(
    "memory traffic of an AdamW step a parameter", 36, "bytes", "exact", "weight, gradient, moments: 5 reads, 4 writes"
)

# Starting things.
RAY_START = _figure("starting Ray on a machine", 17, "s", "measured here", _LIMITS)
POOL_START = _figure("starting a pool of actors, two of them", 9.7, "s", "measured here", _LIMITS)
TRAINER_START = _figure("starting Ray Train, two workers", 27, "s", "measured here", "a `TorchTrainer` with one step")
POOL_ITEM = _figure("handing one unit of work to a pool, in the driver", 6.5, "ms", "measured here", _LIMITS, 1e-3)
SERVE_START = _figure("starting Ray Serve and the service, model aside", 15, "s", "assumed", "as a pool")
LOAD = _figure("reading weights from a node's disk", 2, "GB/s", "assumed", "one NVMe disk", _GB)

# The driver.
HASH = _figure("SHA-256 of local text, a shard at a time", 1500, "MB/s", "measured here", _LIMITS, _MB)
LIST_SHARD = _figure("listing and naming a shard of text", 0.04, "ms", "measured here", _LIMITS, 1e-3)
RECORD_FILE = _figure("record and manifest entry of a file of targets", 5.6, "ms", "measured here", _LIMITS, 1e-3)
OPEN_FILE = _figure("opening a target set, a file", 0.2, "ms", "measured here", _LIMITS, 1e-3)
MANIFEST_FILE = _figure("manifest entry of a file of 39 MB", 1656, "bytes", "measured here", _LIMITS)
OPEN_MEMORY = _figure("memory of an open target set, a file", 4.5, "kB", "measured here", _LIMITS, 1e3)
ORDER = _figure("shuffling an epoch, a sequence", 0.23, "us", "measured here", _LIMITS, 1e-6)
MERGE = _figure("reading and merging a unit's moments, a byte", 1.7, "ns", "measured here", _LIMITS, 1e-9)
TOKENISE = _figure("tokenising and packing text, a core", 0.9, "M tokens/s", "measured here", _LIMITS, _MILLION)
CHECKPOINT = _figure("writing a checkpoint with its checksum", 119, "MB/s", "measured here", _LIMITS, _MB)
SELECT = _figure("drawing and reporting a selection, a layer", 0.1, "s", "measured here", _LIMITS)
RANK = _figure("ranking experts, a layer and expert^2", 0.0104, "ms", "measured here", f"{_LIMITS}, 120B shape", 1e-3)
AVERAGE = _figure(
    "averaging one expert of 24.9 million weights", 0.05, "s", "measured here", "`benchmarks/convert_true_shape.py`"
)
CONVERT_START = _figure("starting `convert`", 5, "s", "measured here", "the same")

# Text.
TOKENS_PER_BYTE = _figure("tokens a byte of text", 0.25, "tokens", "assumed", "English with a large vocabulary")
HELDOUT = _figure("held-out tokens of a source, where they are not known", 1e6, "tokens", "assumed", "a choice")
STORE_REQUEST = _figure("one request to an object store", 30, "ms", "assumed", "usual latency of a small GET", 1e-3)

# What others reach, all weights trained: (model, GPUs, tokens a second and GPU, active parameters).
AUTOMODEL = (("gpt-oss-20b", 8, 13_058, 3.61e9), ("gpt-oss-120b", 64, 7_626, 5.13e9))


def published_utilisation(tokens_per_second: float, active: float, peak: float) -> float:
    """Share of a GPU's peak that a training of all weights uses: 6 operations a token and active parameter.

    Kaplan et al. 2020, arXiv:2001.08361, section 2.1; attention scores are left out, so it is a lower bound.
    """
    return 6 * active * tokens_per_second / peak
