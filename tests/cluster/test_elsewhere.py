"""Heavy steps on a worker of a cluster: what is seen of them here."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import pytest

from nexus_ray.cluster import elsewhere, run_on_worker
from nexus_ray.config import ResourcesSection
from nexus_ray.errors import ArtefactError, NexusError
from nexus_ray.versions import driver_versions

ONE = ResourcesSection(workers=1)


def _step() -> Callable[[str], int]:
    def step(ending: str) -> int:
        """What runs in a worker: inside of a function, since workers cannot import this module."""
        logging.getLogger("nexus_ray.step").info("the step is %s", ending)
        print("printed by the step")
        if ending == "refused":
            raise ArtefactError("the artefact is damaged", "make it again")
        if ending == "wrong":
            raise ZeroDivisionError("a defect")
        if ending == "killed":
            os._exit(9)
        return os.getpid()

    return step


step = _step()


@pytest.fixture
def on_a_cluster(ray_session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's Ray as if it were a cluster of one node that RAY_ADDRESS names."""
    import cloudpickle
    import ray
    import test_elsewhere

    cloudpickle.register_pickle_by_value(test_elsewhere)
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    monkeypatch.setattr(logging.getLogger("nexus_ray"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("nexus_ray"), "level", logging.INFO)


def test_without_a_cluster_it_runs_here(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run_on_worker("step", ONE, step, "done") == os.getpid()


def test_with_one_it_runs_elsewhere_and_is_heard_here(on_a_cluster, caplog, capfd):
    assert run_on_worker("step", ONE, step, ending="done") != os.getpid()
    heard = {(record.getMessage(), record.levelname) for record in caplog.records if record.name == "nexus_ray.step"}
    assert heard == {("the step is done", "INFO")}
    assert "printed by the step" in capfd.readouterr().out


def test_its_errors_are_raised_here_as_they_were(on_a_cluster):
    with pytest.raises(ArtefactError) as caught:
        run_on_worker("step", ONE, step, "refused")
    assert (caught.value.message, caught.value.hint) == ("the artefact is damaged", "make it again")
    with pytest.raises(ZeroDivisionError, match="a defect"):
        run_on_worker("step", ONE, step, "wrong")


def test_a_step_whose_worker_dies_begins_again_and_is_given_up_in_the_end(on_a_cluster, caplog):
    with pytest.raises(NexusError, match="step: its worker died 4 times"):
        run_on_worker("step", ONE, step, "killed")
    assert any("it begins again" in record.getMessage() for record in caplog.records)


def test_a_node_of_other_versions_is_refused_before_it_does_anything(on_a_cluster, monkeypatch):
    monkeypatch.setattr(elsewhere, "driver_versions", lambda: driver_versions() | {"torch": "1.0.0"})
    with pytest.raises(NexusError, match=r"torch .* instead of 1\.0\.0"):
        run_on_worker("step", ONE, step, "done")
