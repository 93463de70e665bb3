"""What the tests of the story share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What the package logs at WARNING and above during the test, whether its records propagate or not."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    package = logging.getLogger("nexus_ray")
    package.addHandler(handler)
    yield messages
    package.removeHandler(handler)
