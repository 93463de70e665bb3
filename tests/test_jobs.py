"""The job entry points hand over to the command line of the repository they lie in, where the cluster fits it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from nexus_ray.config import STAGES

JOBS = Path(__file__).parents[1] / "jobs"
VERBS = {"pipeline": "run"} | {verb: verb for verb in (*STAGES, "export", "pretrain", "serve")}
STUB = """
import select, selectors, sys
def main(arguments):
    select.select, selectors.DefaultSelector  # the standard library's, not jobs/select.py
    print(*arguments, *[path for path in sys.path if path.endswith("jobs")], sep="|")
    sys.exit(3)
"""


def start(script: Path, *arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_there_is_one_for_each_long_running_verb():
    assert {path.stem for path in JOBS.glob("[!_]*.py")} == set(VERBS)


@pytest.fixture
def repository(tmp_path) -> Path:
    """One with all of `jobs/` and a command line that says how it was called."""
    shutil.copytree(JOBS, tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(JOBS.parent / "pyproject.toml", tmp_path)
    (tmp_path / "nexus_ray").mkdir()
    (tmp_path / "nexus_ray" / "__init__.py").touch()
    (tmp_path / "nexus_ray" / "cli.py").write_text(STUB)
    return tmp_path


@pytest.mark.parametrize("job", sorted(VERBS))
def test_a_job_is_its_verb_in_the_repository_it_lies_in(job, repository):
    done = start(repository / "jobs" / f"{job}.py", "a.yaml", "run.seed=3", directory=repository.parent)
    assert done.stderr == ""
    assert done.stdout == f"{VERBS[job]}|a.yaml|run.seed=3\n"
    assert done.returncode == 3


def test_errors_and_exit_codes_are_those_of_the_command_line(tmp_path):
    done = start(JOBS / "select.py", "missing.yaml", directory=tmp_path)
    assert done.returncode == 2
    assert "no configuration file at missing.yaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("torch>=2.13,<2.14", "torch>=99", f"torch {metadata.version('torch')} is installed; needed: >=99"),
        ("torch>=2.13,<2.14", "no-such-package-1x>=2", "no-such-package-1x is not installed; needed: >=2"),
        ('">=3.11"', '">=3.99"', f"Python {platform.python_version()} at {sys.executable}; needed: 3.99 or newer"),
    ],
)
def test_a_cluster_that_does_not_fit_what_was_submitted_is_refused_before_anything_is_imported(
    repository, old, new, problem
):
    project = (repository / "pyproject.toml").read_text()
    assert old in project
    (repository / "pyproject.toml").write_text(project.replace(old, new))
    (repository / "nexus_ray" / "cli.py").write_text("raise AssertionError")
    done = start(repository / "jobs" / "pipeline.py", "a.yaml", directory=repository)
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:2] == [f"  {problem}"]
    assert "constraints.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_stands_in_pyproject_is_what_is_checked(repository):
    """Other packages, and other versions within the range, do not matter."""
    project = (repository / "pyproject.toml").read_text()
    (repository / "pyproject.toml").write_text(project.replace("rich>=13.9", "rich>=1; python_version < '3'"))
    assert start(repository / "jobs" / "train.py", "a.yaml", directory=repository).returncode == 3
