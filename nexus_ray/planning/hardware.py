"""GPUs to plan for, by name: what their makers and a cloud publish of them, and how many make up a cluster.

Every figure is published elsewhere: none was measured here. Gigabytes are read as 10^9 bytes, a little less than what a
driver reports. Prices are list prices of a date and change: `plan.price_per_gpu_hour` replaces them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nexus_ray.errors import ConfigError

GPUS_PER_NODE = 8
_TERA, _GIGA = 1e12, 1e9
_BITS = 8
_SPEC = re.compile(r"(?P<name>[a-z0-9-]+?)(?:x(?P<count>\d+))?")


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, and the nodes of eight of them that a cloud lends.

    Attributes:
        name: as `plan.hardware` calls it.
        memory: bytes.
        flop: dense bfloat16 operations a second, without sparsity.
        bandwidth: bytes a second of its memory.
        link: bytes a second to another GPU of its node, in one direction.
        node_memory: bytes of host memory.
        node_network: bytes a second between nodes.
        price: dollars an hour; None where no list price is known.
        sheet: where memory, operations, bandwidth and link are published.
        offer: where node, network and price are published.
    """

    name: str
    memory: float
    flop: float
    bandwidth: float
    link: float
    node_memory: int
    node_network: float
    price: float | None
    sheet: str
    offer: str


def _gpu(
    name: str,
    figures: tuple[float, float, float, float],
    node: tuple[int, float],
    price: float | None,
    sheet: str,
    offer: str,
) -> Gpu:
    """`figures`: GB, dense bf16 TFLOP/s, GB/s of memory, GB/s to a neighbour; `node`: GiB, Gbit/s."""
    memory, flop, bandwidth, link = figures
    network = node[1] * _GIGA / _BITS
    return Gpu(
        name, memory * _GIGA, flop * _TERA, bandwidth * _GIGA, link * _GIGA, node[0] << 30, network, price, sheet, offer
    )


_HOPPER, _AMPERE, _ADA = (f"NVIDIA {name} data sheet" for name in ("H100 and H200 SXM", "A100 SXM", "L40S"))
_BLOCKS = "Amazon EC2 Capacity Blocks for ML, list until 31 December 2024"
_ON_DEMAND = "g6e.48xlarge; price of g6e.xlarge on demand, us-east-1, August 2025, as quoted by modal.com"
_ALL = (
    _gpu("h100", (80, 989, 3350, 450), (2048, 3200), 4.916, _HOPPER, f"p5.48xlarge, {_BLOCKS}"),
    _gpu("h200", (141, 989, 4800, 450), (2048, 3200), 5.408, _HOPPER, f"p5e.48xlarge, {_BLOCKS}"),
    _gpu("a100", (40, 312, 1555, 300), (1152, 400), 1.844, _AMPERE, f"p4d.24xlarge, {_BLOCKS}"),
    _gpu("a100-80gb", (80, 312, 2039, 300), (1152, 400), None, _AMPERE, "p4de.24xlarge; no list price at hand"),
    _gpu("l40s", (48, 362, 864, 32), (1536, 400), 1.861, _ADA, _ON_DEMAND),
)
GPUS = {gpu.name: gpu for gpu in _ALL}


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind.

    Attributes:
        gpu: their kind.
        gpus: how many in all.
    """

    gpu: Gpu
    gpus: int

    @property
    def per_node(self) -> int:
        """GPUs of a node."""
        return min(self.gpus, GPUS_PER_NODE)

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.gpus // GPUS_PER_NODE)

    @property
    def name(self) -> str:
        """As `plan.hardware` has it."""
        return f"{self.gpu.name}x{self.gpus}"


def parse_hardware(text: str) -> Cluster:
    """`h100x16`, or `h100` for a whole node of eight.

    Raises:
        ConfigError: there is no such GPU, or not a positive number of them.
    """
    found = _SPEC.fullmatch(text.strip().lower())
    name, count = (found["name"], found["count"]) if found else ("", None)
    if name not in GPUS:
        raise ConfigError(
            f"plan.hardware={text!r} is no known GPU", f"write NAMExCOUNT, e.g. h100x16; names: {', '.join(GPUS)}"
        )
    gpus = int(count) if count else GPUS_PER_NODE
    if not gpus or (gpus > GPUS_PER_NODE and gpus % GPUS_PER_NODE):
        raise ConfigError(
            f"plan.hardware={text!r}: nodes have {GPUS_PER_NODE} GPUs",
            f"write a number up to {GPUS_PER_NODE}, or a multiple of it",
        )
    return Cluster(GPUS[name], gpus)


def kind_of_device(name: str) -> Gpu | None:
    """The kind of a GPU by what its driver calls it, e.g. "NVIDIA H100 80GB HBM3"; None of one that is not listed."""
    words = name.lower().replace("-", " ").split()
    found = next((gpu for gpu in ("h100", "h200", "a100", "l40s") if gpu in words), None)
    return GPUS["a100-80gb"] if found == "a100" and "80gb" in words else GPUS.get(found or "")
