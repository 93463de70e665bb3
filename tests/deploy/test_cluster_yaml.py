"""cluster.yaml is what Ray's cluster launcher accepts, and asks for what its comments say."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


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


def workers(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    types = prepare_config(copy.deepcopy(cluster))["available_node_types"]
    return {name: node for name, node in types.items() if name != cluster["head_node_type"]}


def test_gpu_workers_scale_from_zero(cluster):
    assert all(node["min_workers"] == 0 < node["max_workers"] for node in workers(cluster).values())
    assert sum(node["max_workers"] for node in workers(cluster).values()) == cluster["max_workers"]
    assert all(node["node_config"]["InstanceType"].startswith(("g", "p")) for node in workers(cluster).values())


def test_spot_machines_are_asked_for_first(cluster):
    """By Ray's own choice of nodes: ten workers with a GPU on machines of 16 CPUs and one GPU."""
    types = workers(cluster)
    for node in types.values():
        node["resources"] = {"CPU": 16, "GPU": 1}
    wanted = [{"CPU": 8, "GPU": 1}] * 10
    scorer = functools.partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({}))
    first, _ = get_nodes_for(types, {}, "head", 1, list(wanted), scorer)
    every, left = get_nodes_for(types, {}, "head", 10, list(wanted), scorer)
    [spot] = [name for name, node in types.items() if "InstanceMarketOptions" in node["node_config"]]
    assert dict(first) == {spot: 1}
    assert dict(every) == {spot: 8, "gpu_on_demand": 2}
    assert not left


def test_the_head_has_no_gpu_and_does_no_work(cluster):
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["node_config"]["InstanceType"].startswith(("m", "c", "r"))
    assert head["resources"]["CPU"] == 0


def test_base_models_are_kept_on_the_disks_of_nodes(cluster):
    [command] = [command for command in cluster["setup_commands"] if "NEXUS_RAY_CACHE" in command]
    assert "/opt/dlami/nvme" in command


def test_every_node_installs_the_mounted_project_at_the_locked_versions(cluster):
    [mount] = cluster["file_mounts"]
    home = f"/home/{cluster['auth']['ssh_user']}"
    installs = [command.replace("~", home) for command in cluster["setup_commands"] if "pip install" in command]
    assert any(f"-e '{mount}[s3]'" in command and f"-c {mount}/constraints.txt" in command for command in installs)
