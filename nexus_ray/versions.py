"""What runs in a process, and refusing to let workers compute with something else than their driver.

Ray itself refuses nodes with another Python or Ray. It does not see a node whose image was built at another time, with
another torch, or with a `nexus_ray` installed that is not the one the driver runs.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

from nexus_ray.errors import NexusError

# Of others a minor version is enough: their patches change neither results nor what crosses processes.
_EXACT = ("ray", "torch", "transformers")
_MINOR = ("numpy", "pyarrow", "pydantic", "safetensors", "tokenizers")
_SOURCES = "nexus_ray's sources"


@cache
def versions_here() -> dict[str, str]:
    """{name: version} of what decides results or crosses processes; of `nexus_ray` a digest of its sources.

    Of a version like 2.13.0+cpu the build is left out: a head without a GPU may have another one than its workers.
    """
    versions = {"Python": _minor(platform.python_version())}
    versions |= {name: _public(metadata.version(name)) for name in _EXACT}
    versions |= {name: _minor(metadata.version(name)) for name in _MINOR}
    return versions | {_SOURCES: _digest(Path(__file__).parent)}


def driver_versions() -> dict[str, str]:
    """What workers of this process must have; nothing where Ray was started here, from the same files."""
    return versions_here() if os.environ.get("RAY_ADDRESS") else {}


def require_same(driver: Mapping[str, str], node: str) -> None:
    """Called by a worker before it loads anything.

    Args:
        driver: `driver_versions()` of the process that started it.
        node: what this machine is called in the message.

    Raises:
        NexusError: it names what differs.
    """
    here = versions_here() if driver else {}
    wrong = [
        f"{name} {here.get(name)} instead of {wanted}" for name, wanted in driver.items() if here.get(name) != wanted
    ]
    if wrong:
        place = f" (imported from {Path(__file__).parent})" if driver.get(_SOURCES) != here.get(_SOURCES) else ""
        raise NexusError(
            f"the worker on {node} does not fit the process that started it: {', '.join(wrong)}{place}",
            "submit with `ray job submit --working-dir .`, which gives all nodes the same code, and install the same "
            "packages on all of them (constraints.txt); then submit again: it continues",
        )


def _public(version: str) -> str:
    return version.partition("+")[0]


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _digest(directory: Path) -> str:
    """A short digest of a package's source files and their names."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(directory).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:12]
