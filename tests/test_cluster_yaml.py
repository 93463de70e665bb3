"""cluster.yaml is what Ray's cluster launcher accepts, and asks for what its comments say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))


def test_ray_accepts_it(cluster):
    """As `ray up` does: fill in the provider's defaults, then validate."""
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_ray_would_refuse_a_misspelt_field(cluster):
    """The check above can fail: Ray's schema is closed."""
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(cluster | {"max_wokers": 1}))


def test_gpu_workers_scale_from_zero_to_eight(cluster):
    prepared = prepare_config(copy.deepcopy(cluster))
    [worker] = [node for name, node in prepared["available_node_types"].items() if name != prepared["head_node_type"]]
    assert (worker["min_workers"], worker["max_workers"], prepared["max_workers"]) == (0, 8, 8)
    assert worker["node_config"]["InstanceType"].startswith(("g", "p"))


def test_the_head_has_no_gpu(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["node_config"]["InstanceType"].startswith(("m", "c", "r"))


def test_every_node_installs_the_mounted_project_at_the_locked_versions(cluster):
    [mount] = cluster["file_mounts"]
    home = f"/home/{cluster['auth']['ssh_user']}"
    installs = [command.replace("~", home) for command in cluster["setup_commands"] if "pip install" in command]
    assert any(f"-e {mount}" in command and f"-c {mount}/constraints.txt" in command for command in installs)
