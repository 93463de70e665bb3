"""Fixtures of the service tests: an engine over the micro student, and its HTTP interface without Ray."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Stage, chromium, missing_browser, served
from fastapi.testclient import TestClient
from scripted_api import Script, scripted_api

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
