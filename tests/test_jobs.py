"""The job entry points hand over to the command line of the repository they lie in, installed or not."""

from __future__ import annotations

import shutil
import subprocess
import sys
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
    return subprocess.run(
        [sys.executable, script, *arguments], cwd=directory, capture_output=True, text=True, check=False
    )


def test_there_is_one_for_each_long_running_verb():
    assert {path.stem for path in JOBS.glob("[!_]*.py")} == set(VERBS)


@pytest.mark.parametrize("job", sorted(VERBS))
def test_a_job_is_its_verb_in_the_repository_it_lies_in(job, tmp_path):
    shutil.copytree(JOBS, tmp_path / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "nexus_ray").mkdir()
    (tmp_path / "nexus_ray" / "__init__.py").touch()
    (tmp_path / "nexus_ray" / "cli.py").write_text(STUB)
    done = start(tmp_path / "jobs" / f"{job}.py", "a.yaml", "run.seed=3", directory=tmp_path.parent)
    assert done.stderr == ""
    assert done.stdout == f"{VERBS[job]}|a.yaml|run.seed=3\n"
    assert done.returncode == 3


def test_errors_and_exit_codes_are_those_of_the_command_line(tmp_path):
    done = start(JOBS / "select.py", "missing.yaml", directory=tmp_path)
    assert done.returncode == 2
    assert "no configuration file at missing.yaml" in done.stderr
    assert "Traceback" not in done.stderr
