"""Fixtures of the service tests: an engine over the micro student, and its HTTP interface without Ray."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from nexus_ray.config import ModelSection
from nexus_ray.generation.engine import Engine
from nexus_ray.generation.scoring import Scorer
from nexus_ray.modeling.loading import load_student
from serve.routes import build_api
from serve.service import Service


@pytest.fixture(scope="session")
def engine(micro_model: Path, micro_overlay: Path) -> Iterator[Engine]:
    loaded = load_student(ModelSection(path=micro_model), micro_overlay)
    engine = Engine(loaded, Scorer(loaded, 32, 2), max_new_tokens=400, max_requests=2)
    yield engine
    engine.close()


@pytest.fixture
def service(engine: Engine) -> Service:
    return Service(engine, "bard")


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(build_api(service), raise_server_exceptions=False) as client:
        yield client
