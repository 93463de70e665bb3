"""The image: free of what the linter knows to be wrong, and made of files that are there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/Dockerfile"
# beside this Python, whether or not its environment is activated
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or "hadolint"


def lint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([HADOLINT, "-"], input=text, capture_output=True, text=True, check=False)


def copied() -> list[str]:
    """What `COPY` takes from the repository."""
    lines = [line.split() for line in DOCKERFILE.read_text().splitlines() if line.startswith("COPY ")]
    return [source for line in lines for source in line[1:-1]]


def test_the_linter_finds_nothing():
    result = lint(DOCKERFILE.read_text())
    assert result.returncode == 0, result.stdout


def test_the_linter_would_find_something():
    assert lint(DOCKERFILE.read_text() + "RUN cd /tmp\n").returncode != 0


@pytest.mark.parametrize("source", copied())
def test_what_is_copied_is_there_and_not_ignored(source):
    assert (ROOT / source).exists()
    kept = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")]
    assert source in kept


def test_nothing_else_is_sent_to_the_builder():
    kept = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    assert kept == set(copied())
