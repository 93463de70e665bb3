"""The Kubernetes manifests have the fields that KubeRay and Kubernetes know, and say what the project needs."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from kuberay_schema import OF_KIND
from ray.serve.schema import ServeDeploySchema

from nexus_ray.config import load_config
from serve.app import BuilderArguments

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "deploy/kuberay").glob("*.yaml"))
KUBERNETES = "1.30"  # the oldest that is looked at: newer ones keep its fields


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def ray_object(path: Path) -> dict[str, Any]:
    [found] = [document for document in documents(path) if document["kind"] in OF_KIND]
    return found


def cluster_of(path: Path) -> dict[str, Any]:
    spec = ray_object(path)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod template in a document."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("template", "submitterPodTemplate"):
                yield inner
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def validate(document: dict[str, Any]) -> None:
    jsonschema.validate(document["spec"], OF_KIND[document["kind"]])
    for pod in pods(document):
        as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **pod}
        kubernetes_validate.validate(as_pod, KUBERNETES, strict=True)


def test_there_is_one_of_each_kind():
    assert {ray_object(path)["kind"] for path in MANIFESTS} == set(OF_KIND)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_field_is_known(path):
    for document in documents(path):
        if document["kind"] in OF_KIND:
            validate(document)
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_misspelt_field_would_be_refused(path):
    document = ray_object(path)
    broken = copy.deepcopy(document)
    broken["spec"]["suspnd"] = True
    with pytest.raises(jsonschema.ValidationError):
        validate(broken)
    broken = copy.deepcopy(document)
    next(pods(broken))["spec"]["contaners"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(broken)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_head_and_workers_are_of_this_release(path):
    images = {container["image"] for pod in pods(ray_object(path)) for container in pod["spec"]["containers"]}
    assert images == {f"nexus-ray:{importlib.metadata.version('nexus-ray')}"}
    assert cluster_of(path)["rayVersion"] == ray.__version__


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_head_does_no_work_and_has_no_gpu(path):
    head = cluster_of(path)["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    [container] = head["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_workers_have_a_gpu_scale_and_keep_base_models_on_their_node(path):
    for group in cluster_of(path)["workerGroupSpecs"]:
        assert group["minReplicas"] < group["maxReplicas"]
        spec = group["template"]["spec"]
        [container] = spec["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        [cache] = [volume for volume in spec["volumes"] if volume["name"] == mounted["/cache"]]
        assert "hostPath" in cache
    assert cluster_of(path)["enableInTreeAutoscaling"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_what_a_worker_asks_for_fits_a_pod(path, tmp_path):
    """A worker that needs all of a pod's CPUs would leave none for Ray's own actors."""
    for config in configurations(path, tmp_path):
        for group in cluster_of(path)["workerGroupSpecs"]:
            [container] = group["template"]["spec"]["containers"]
            assert config.resources.cpus_per_worker < int(container["resources"]["requests"]["cpu"])
            assert config.resources.gpus_per_worker <= int(container["resources"]["limits"]["nvidia.com/gpu"])


def configurations(path: Path, tmp_path: Path) -> list[Any]:
    """The configurations in a manifest's config maps, as the project reads them."""
    found = []
    for document in documents(path):
        if document["kind"] == "ConfigMap":
            file = tmp_path / "run.yaml"
            file.write_text(document["data"]["run.yaml"])
            found.append(load_config(file, []))
    return found


def test_job_and_service_carry_a_valid_configuration(tmp_path):
    assert all(configurations(path, tmp_path) for path in MANIFESTS if path.stem != "raycluster")


def test_the_service_is_what_ray_serve_and_the_application_accept():
    document = ray_object(ROOT / "deploy/kuberay/rayservice.yaml")
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(document["spec"]["serveConfigV2"]))
    [application] = deployed.applications
    assert application.import_path == "serve.app:build_app"
    BuilderArguments.model_validate(application.args)


def test_the_job_runs_a_script_that_the_image_has():
    entrypoint = ray_object(ROOT / "deploy/kuberay/rayjob.yaml")["spec"]["entrypoint"].split()
    home = "/opt/nexus-ray/"
    assert entrypoint[0] == "python"
    assert entrypoint[1].startswith(home)
    assert (ROOT / entrypoint[1].removeprefix(home)).is_file()
    assert f"WORKDIR {home.rstrip('/')}" in (ROOT / "deploy/Dockerfile").read_text()
