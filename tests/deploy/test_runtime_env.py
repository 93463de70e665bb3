"""The runtime environments are what Ray accepts, ask for this release's packages, and upload what a job needs."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray._private.runtime_env.packaging import _get_excludes, get_excludes_from_ignore_files
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "deploy" / "runtime_env.yaml", ROOT / "deploy" / "runtime_env-bare.yaml"]
LIMIT_BYTES = 500 * 2**20  # Ray's, of an uploaded working directory


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture
def bare() -> list[Requirement]:
    constraints, *packages = read(FILES[1])["pip"]["packages"]
    assert constraints == "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"
    return [Requirement(package) for package in packages]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ray_accepts_it(path):
    RuntimeEnv(**read(path))


def test_ray_would_refuse_a_value_that_is_no_text():
    with pytest.raises(TypeError):
        RuntimeEnv(env_vars={"RAY_JOB_STOP_WAIT_TIME_S": 60})


def test_a_bare_cluster_gets_every_direct_dependency_at_its_pinned_version(bare):
    with (ROOT / "pyproject.toml").open("rb") as file:
        wanted = [Requirement(line) for line in tomllib.load(file)["project"]["dependencies"]]
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    given = {requirement.name: requirement for requirement in bare}
    assert set(given) - {"s3fs"} == {requirement.name for requirement in wanted}
    for requirement in wanted:
        assert given[requirement.name].extras == requirement.extras
    for name, requirement in given.items():
        assert str(requirement.specifier) == f"=={pins[name.lower().replace('_', '-')]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_uploaded_has_the_code_and_is_far_below_rays_limit(path):
    """By Ray's own rules for `.gitignore` and `excludes`."""
    ignored = [*get_excludes_from_ignore_files(ROOT, True), _get_excludes(ROOT, read(path)["excludes"])]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    files = [ROOT / name for name in listed if (ROOT / name).is_file()]
    sent = {file.relative_to(ROOT).as_posix(): file.stat().st_size for file in files if not _is_out(file, ignored)}
    needed = {"jobs/pipeline.py", "nexus_ray/cli/main.py", "serve/app.py", "configs/demo.yaml", "pyproject.toml"}
    assert needed | {"constraints.txt", "assets/tiny-gpt-oss/config.json"} <= set(sent)
    assert not {name.partition("/")[0] for name in sent} & {"tests", "docs", "benchmarks"}
    assert sum(sent.values()) < LIMIT_BYTES / 10
    for place in (".venv/bin/python", "runs/demo/config.yaml", "build/x"):
        assert _is_out(ROOT / place, ignored)


def _is_out(file: Path, ignored: list[Any]) -> bool:
    """Ray asks about every directory on the way first, and does not enter those that are out."""
    ways = [file, *[parent for parent in file.parents if parent.is_relative_to(ROOT) and parent != ROOT]]
    return any(rule(way) for rule in ignored for way in ways)
