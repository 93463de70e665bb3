"""Fixtures of the service tests: an engine over the micro student, and its HTTP interface without Ray."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from nexus_ray.config import ModelSection
from nexus_ray.generation.assistant import Assistant
from nexus_ray.generation.batching.engine import BatchingEngine
from nexus_ray.generation.batching.paged import BatchLimits
from nexus_ray.generation.codec import Codec
from nexus_ray.modeling.loading import load_base
from serve.api import build_api
from serve.service import Service


@pytest.fixture(scope="session")
def assistant(micro_model: Path, micro_overlay: Path) -> Iterator[Assistant]:
    base = load_base(ModelSection(path=micro_model))
    engine = BatchingEngine(base, {"bard": micro_overlay}, BatchLimits(requests=8, cache_tokens=8192))
    assistant = Assistant(engine, Codec.of(base), max_new_tokens=400)
    yield assistant
    assistant.close()


@pytest.fixture
def service(assistant: Assistant) -> Service:
    return Service(assistant, sequence_length=32)


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(build_api(service), raise_server_exceptions=False) as client:
        yield client
