"""Fixtures of the service tests: an engine over the micro student, and its HTTP interface without Ray."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
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


@contextmanager
def listening(api: FastAPI) -> Iterator[str]:
    """The address of an application on a real socket, while the block runs."""
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended before it began"
        time.sleep(0.01)
    [listener] = server.servers
    yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="session")
def live(assistant: Assistant) -> Iterator[str]:
    """The interface on a real socket, for clients that bring their own HTTP."""
    with listening(build_api(Service(assistant, 32))) as address:
        yield address


@pytest.fixture(scope="session")
def live_and_short(assistant: Assistant) -> Iterator[str]:
    """The same with short answers, for many requests."""
    with listening(build_api(Service(Assistant(assistant.engine, assistant.codec, max_new_tokens=3), 32))) as address:
        yield address
