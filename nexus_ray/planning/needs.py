"""The vocabulary of a plan: parts, phases and the needs of a stage, in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MIB, GIB = 1 << 20, 1 << 30

# glibc serves larger blocks by mmap once its threshold has risen to its limit (mallopt(3), M_MMAP_THRESHOLD).
_LARGEST_HEAP_BLOCK = 32 * MIB
# Of heap blocks that come and go: what their holes add. 0.0 to 1.1 in the runs that plan_accuracy.py was tried on.
_FRAGMENTATION = 0.5

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Part:
    """Memory or storage of one purpose.

    Attributes:
        name: what it is for.
        size: bytes.
        note: what it is made of.
        block: bytes of its largest tensors when they come and go; 0 for what stays for the whole run.
    """

    name: str
    size: int
    note: str = ""
    block: int = 0

    @property
    def from_heap(self) -> bool:
        """Whether freeing it leaves holes in the C library's heap instead of going back to the system."""
        return 0 < self.block < _LARGEST_HEAP_BLOCK


@dataclass(frozen=True)
class Phase:
    """Parts that are alive at the same time.

    Attributes:
        name: when.
        parts: what is held then; empty ones are left out.
    """

    name: str
    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    @property
    def heap(self) -> int:
        """Bytes of the parts in the C library's heap."""
        return sum(part.size for part in self.parts if part.from_heap)


@dataclass(frozen=True)
class StageNeeds:
    """Memory of one stage.

    Attributes:
        stage: its verb.
        processes: workers that hold this at the same time.
        device: where the model is.
        devices: how many a worker spreads it over.
        phases: what one device (the host's memory on a CPU) of one worker holds at different times; of several
            devices the one that holds most.
        mapped: bytes of mapped files; the workers of a node share them and the kernel may drop them.
        host: anonymous host memory of a worker whose model is on a GPU.
        sharing: workers that share one GPU.
        of_devices: the phases of each device, where there are several.
        layers: the decoder layers of each device; empty where no model is loaded.
    """

    stage: str
    processes: int
    device: Device
    devices: int
    phases: tuple[Phase, ...]
    mapped: int = 0
    host: int = 0
    sharing: int = 1
    of_devices: tuple[tuple[Phase, ...], ...] = ()
    layers: tuple[tuple[int, ...], ...] = ()

    @property
    def device_peaks(self) -> tuple[int, ...]:
        """Bytes that each device of a worker holds at its worst moment."""
        if not self.of_devices:
            return (self.peak.total,)
        return tuple(max(each.total for each in phases) for phases in self.of_devices)

    @property
    def peak(self) -> Phase:
        """The phase that takes most; on a CPU with what the allocator keeps of others.

        Freed blocks of the heap stay with the process, so its peak is the most that large blocks take in any phase,
        and the most that the heap holds in any phase, with holes.
        """
        worst = max(self.phases, key=lambda each: each.total)
        if self.device != "cpu":
            return worst
        heap = max(each.heap for each in self.phases)
        large = max(each.total - each.heap for each in self.phases)
        kept = int(large + heap * (1 + _FRAGMENTATION)) - worst.total
        note = "freed blocks of all phases, and holes"
        return Phase(worst.name, (*worst.parts, Part("kept by the allocator", max(0, kept), note)))


def phase(name: str, *parts: Part) -> Phase:
    """A phase of the parts that are not empty."""
    return Phase(name, tuple(part for part in parts if part.size))
