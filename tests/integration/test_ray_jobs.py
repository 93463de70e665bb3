"""`ray job submit` and `ray job stop`: what was stopped continues, two of the same run do not mix, a lost head costs no
finished work.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from private_cluster import PrivateCluster, wait_until

from nexus_ray.config import Config, save_config
from nexus_ray.layout import RunLayout
from nexus_ray.router.collect import collect
from nexus_ray.storage import sha256_file

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]
_SMALL_UNITS = {"collect.batch_sequences": 1, "collect.unit_batches": 1, "collect.tokens": 8192}
_WORKERS = ("MapWorker", "RayTrainWorker", "jobs/")  # and the driver


def saved(config: Config, path: Path) -> Path:
    save_config(config, path)
    return path


def parts(layout: RunLayout) -> int:
    return len(list((layout.directory / "router_stats.partial").glob("unit-*.safetensors")))


def digests(layout: RunLayout) -> list[str]:
    files = (layout.router_stats, layout.calibration)
    return [sha256_file(path) for file in files for path in (file, file.with_suffix(".json"))]


@pytest.mark.usefixtures("in_process")
def test_a_stopped_job_continues_when_it_is_submitted_again_and_a_second_one_is_refused(make_micro_config, tmp_path):
    config = make_micro_config(tmp_path / "run", **_SMALL_UNITS)
    path, layout = saved(config, tmp_path / "run.yaml"), RunLayout(config.run.directory)
    arguments = (path, "--until", "collect")
    with PrivateCluster() as cluster:
        first = cluster.submit("pipeline", *arguments)
        wait_until(lambda: parts(layout) >= 3, "the first parts")
        workers = cluster.processes("MapWorker")
        for worker in workers:
            worker.suspend()  # the stage is in its middle, and stays there
        left = parts(layout)

        second = cluster.submit("pipeline", *arguments)
        assert cluster.wait_for_end(second) == "FAILED"
        assert f"another nexus-ray is working in {layout.directory}" in cluster.message(second)
        assert "Traceback" not in cluster.message(second)

        cluster.stop(first)
        assert cluster.status(first) == "STOPPED"
        assert cluster.log(first)[-1] == "interrupted; the same command continues where this one stopped"
        for worker in workers:
            worker.resume()
        wait_until(lambda: not cluster.processes(*_WORKERS), "no worker and no driver stays behind")
        assert left <= parts(layout)
        assert not layout.router_stats.exists()

        again = cluster.submit("pipeline", *arguments)
        assert cluster.wait_for_end(again) == "SUCCEEDED", cluster.log(again)
        log = cluster.log(again)
        wait_until(lambda: not cluster.processes(*_WORKERS), "no worker and no driver stays behind")

    assert any("continuing: " in line for line in log), "what was done is not done again"
    assert log[-2] == f"done: router_stats {layout.router_stats}"
    assert json.loads(log[-1]) == {"done": "run", "artefacts": {"router_stats": str(layout.router_stats)}}
    assert not any("Traceback" in line for line in log)

    undisturbed = make_micro_config(tmp_path / "undisturbed", **_SMALL_UNITS)
    whole = RunLayout(undisturbed.run.directory)
    collect(undisturbed, whole)
    assert digests(layout) == digests(whole)
