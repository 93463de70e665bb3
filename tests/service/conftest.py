"""Fixtures of the service tests: an engine over the micro student, and its HTTP interface without Ray."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Stage, chromium, missing_browser, served
from fastapi.testclient import TestClient
from scripted_api import Script, scripted_api

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


@pytest.fixture(scope="session")
def live(assistant: Assistant) -> Iterator[str]:
    """The interface on a real socket, for clients that bring their own HTTP."""
    with served(build_api(Service(assistant, 32))) as address:
        yield address


@pytest.fixture(scope="session")
def live_and_short(assistant: Assistant) -> Iterator[str]:
    """The same with short answers, for many requests."""
    with served(build_api(Service(Assistant(assistant.engine, assistant.codec, max_new_tokens=3), 32))) as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """One headless Chromium for all tests of the page."""
    if (reason := missing_browser()) is not None:
        pytest.skip(reason)
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    """One server for all tests of the page."""
    stage = Stage()
    with served(stage) as stage.address:
        yield stage


@pytest.fixture
def script() -> Script:
    """What the stand-in for the interface says."""
    return Script()


@pytest.fixture
def page(stage: Stage, script: Script, browser: Any) -> Iterator[Any]:
    """The page over the stand-in, not opened yet."""
    from web_page import WebPage  # needs selenium, which may be missing

    stage.app = scripted_api(script)
    page = WebPage(browser, stage.address)
    page.reset()
    yield page
    page.close()
