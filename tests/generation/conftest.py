"""Fixtures of the generation and service tests: engines over the micro model."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nexus_ray.config import ModelSection
from nexus_ray.generation.engine import Engine
from nexus_ray.generation.scoring import Scorer
from nexus_ray.modeling.loading import LoadedModel, load_base, load_student


@pytest.fixture(scope="session")
def student(micro_model: Path, micro_overlay: Path) -> LoadedModel:
    return load_student(ModelSection(path=micro_model), micro_overlay)


@pytest.fixture(scope="session")
def plain_base(micro_model: Path) -> LoadedModel:
    return load_base(ModelSection(path=micro_model))


@pytest.fixture
def make_engine() -> Iterator[Callable[..., Engine]]:
    engines = []

    def make(loaded: LoadedModel, sequence_length: int = 32, **limits: int) -> Engine:
        engine = Engine(loaded, Scorer(loaded, sequence_length, 2), **limits)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(make_engine: Callable[..., Engine], student: LoadedModel) -> Engine:
    return make_engine(student)
