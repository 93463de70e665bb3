"""Does this cluster fit the code that was submitted? Asked before anything of it is imported.

The code comes with the job, Python and the packages are the cluster's. What the code needs stands in its own
`pyproject.toml`. This file must be read by any Python 3.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

_HINT = (
    "install this release's packages on every node (`pip install -e . -c constraints.txt`, as cluster.yaml does), or "
    "let Ray install them for the job: `ray job submit --runtime-env deploy/runtime_env-bare.yaml ...`"
)


def require_fitting_cluster(repository: Path) -> None:
    """End the process with code 1 and a message where Python or a package is not what the code needs.

    Args:
        repository: what was submitted; without `pyproject.toml` nothing is asked.
    """
    project = repository / "pyproject.toml"
    text = project.read_text(encoding="utf-8") if project.exists() else ""
    problems = _python(text) or _packages(text)
    if problems:
        lines = "".join("\n  " + problem for problem in problems)
        sys.stderr.write(f"error: this cluster does not fit the nexus-ray that was submitted:{lines}\n  -> {_HINT}\n")
        sys.exit(1)


def _python(project: str) -> list[str]:
    """What is wrong with Python; older ones than the oldest allowed cannot read TOML."""
    wanted = re.search(r'^requires-python *= *">=(\d+)\.(\d+)"', project, re.MULTILINE)
    oldest = (int(wanted[1]), int(wanted[2])) if wanted else (3, 11)
    if sys.version_info >= oldest:
        return []
    return [f"Python {sys.version.split()[0]} at {sys.executable}; needed: {oldest[0]}.{oldest[1]} or newer"]


def _packages(project: str) -> list[str]:
    """What is wrong with the packages."""
    import tomllib
    from importlib import metadata  # which imports `select`: not before jobs/ is off the search path

    from packaging.requirements import Requirement

    problems = []
    for requirement in map(Requirement, tomllib.loads(project).get("project", {}).get("dependencies", ())):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed; needed: {requirement.specifier}")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found} is installed; needed: {requirement.specifier}")
    return problems
