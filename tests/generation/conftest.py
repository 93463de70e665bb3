"""Fixtures of the generation tests: assistants over the micro model, and the models themselves as references."""

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from nexus_ray.config import ModelSection
from nexus_ray.generation.assistant import Assistant
from nexus_ray.generation.batching.engine import BatchingEngine
from nexus_ray.generation.batching.paged import BatchLimits
from nexus_ray.generation.codec import Codec
from nexus_ray.modeling.loading import LoadedModel, load_base, load_student


class TheSameDay(datetime):
    """What prompts say of today is the same every day: on some days the answers of random weights end early."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2026, 11, 22, 12, tzinfo=tz)


@pytest.fixture(autouse=True)
def _every_day_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", TheSameDay)


@pytest.fixture(scope="session")
def student(micro_model: Path, micro_overlay: Path) -> LoadedModel:
    return load_student(ModelSection(path=micro_model), micro_overlay)


@pytest.fixture(scope="session")
def plain_base(micro_model: Path) -> LoadedModel:
    return load_base(ModelSection(path=micro_model))


def _load(model: Path, overlays: dict[str, Path], max_new_tokens: int = 512, **limits: int) -> Assistant:
    base = load_base(ModelSection(path=model))
    engine = BatchingEngine(base, overlays, BatchLimits(**{"cache_tokens": 8192} | limits))
    return Assistant(engine, Codec.of(base), max_new_tokens)


@pytest.fixture
def make_assistant(micro_model: Path, micro_overlay: Path) -> Iterator[Callable[..., Assistant]]:
    """A function that loads an engine of its own: overlays by name, then fields of `BatchLimits`."""
    assistants = []

    def make(overlays: dict[str, Path] | None = None, **limits: int) -> Assistant:
        assistants.append(_load(micro_model, {"student": micro_overlay} if overlays is None else overlays, **limits))
        return assistants[-1]

    yield make
    for assistant in assistants:
        assistant.close()


@pytest.fixture(scope="session")
def assistant(micro_model: Path, micro_overlay: Path) -> Iterator[Assistant]:
    """One engine for all tests that leave it as it was."""
    assistant = _load(micro_model, {"student": micro_overlay})
    yield assistant
    assistant.close()
