"""What benchmark scripts share: the JSON line they end with, and the memory of this process while it works."""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nexus_ray.console import setup_logging
from nexus_ray.errors import NexusError

_STATUS = Path("/proc/self/status")
_KIB = 1024


def print_result(values: Mapping[str, Any]) -> None:
    """Print the result as one JSON object on the last line; NaN and infinity are refused."""
    print(json.dumps(dict(values), allow_nan=False), flush=True)


@contextmanager
def command_line() -> Iterator[None]:
    """Run a script's main function: log lines as in `nexus-ray`, no traceback for a `NexusError` or Ctrl-C."""
    setup_logging()
    try:
        yield
    except NexusError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def memory_bytes(field: str) -> int:
    """A field of /proc/self/status in bytes, e.g. RssAnon (now), RssFile (now), VmHWM (peak resident)."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * _KIB
    raise NexusError(f"{_STATUS} has no field {field}", "this benchmark needs Linux")


def release_free_memory() -> None:
    """Give the allocator's free pages back to the system, so that what is taken next shows in full (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@dataclass
class MemoryPeak:
    """Largest anonymous and resident memory of this process within a `with` block, sampled by a thread.

    Anonymous memory is what the process asked for; resident memory also counts the touched pages of mapped files,
    which the kernel can drop at any time and which processes share.

    Attributes:
        interval: seconds between samples.
        start_anonymous: anonymous bytes at entry.
        anonymous: largest anonymous bytes seen.
        resident: largest resident bytes seen.
    """

    interval: float = 0.001
    start_anonymous: int = 0
    anonymous: int = 0
    resident: int = 0

    def __enter__(self) -> Self:
        release_free_memory()
        self.start_anonymous = memory_bytes("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()

    @property
    def transient(self) -> int:
        """Anonymous bytes at the peak above those at entry."""
        return self.anonymous - self.start_anonymous

    def sample(self) -> None:
        """Look once."""
        self.anonymous = max(self.anonymous, memory_bytes("RssAnon"))
        self.resident = max(self.resident, memory_bytes("VmRSS"))

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.sample()
            time.sleep(self.interval)
