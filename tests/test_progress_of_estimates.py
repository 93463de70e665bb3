"""Progress towards a total that is an estimate: the bar says so, follows what items turn out to be, and ends full."""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Iterator

import numpy as np
import pytest
from rich.console import Console

from nexus_ray import console
from nexus_ray.cluster import Forecast
from nexus_ray.console import progress, setup_logging


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    package = logging.getLogger("nexus_ray")
    before = package.handlers, package.level, package.propagate
    yield
    package.handlers, package.level, package.propagate = before[0], before[1], before[2]


@pytest.mark.parametrize("seed", range(10))
def test_a_forecast_ends_at_what_was_done_and_never_before(seed: int) -> None:
    generator = np.random.default_rng(seed)
    expected = generator.integers(1, 500, 20).tolist()
    done = (np.asarray(expected) * generator.uniform(0, 4, 20)).astype(int).tolist()
    forecast = Forecast(sum(expected))
    totals = [forecast.after(steps, hope) for steps, hope in zip(done, expected, strict=True)]
    assert totals[-1] == sum(done)
    assert all(total >= sum(done[: number + 1]) for number, total in enumerate(totals))


def test_a_forecast_follows_what_the_first_items_were() -> None:
    forecast = Forecast(1000)
    assert forecast.after(300, 100) == 300 + 3 * 900
    assert forecast.after(0, 100) == 300 + round(1.5 * 800)
    assert Forecast(10).after(0, 4) == 6


def test_lines_say_about_until_the_end(monkeypatch, capsys) -> None:
    monkeypatch.setattr(console, "console", Console(file=io.StringIO(), force_terminal=False))
    clock = itertools.count(0.0, 20.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    setup_logging()
    with progress("precompute", total=1000, unit="tokens", about=True) as advance:
        advance(1500, 4500)
        advance(2000, 3500)
    lines = [line.split(" INFO ")[1] for line in capsys.readouterr().err.splitlines()]
    assert lines[0].startswith("precompute: 1,500 of about 4,500 tokens, ")
    assert lines[1].startswith("precompute: 3,500 of 3,500 tokens, ")
    assert len(lines) == 2


def test_a_bar_says_about_until_the_end(monkeypatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=output, force_terminal=True, width=120))
    setup_logging()
    with progress("precompute", total=1000, unit="tokens", about=True) as advance:
        assert "0 of about 1,000" in output.getvalue()
        advance(1500, 4500)
        advance(2000, 3500)
    assert "3,500/3,500" in output.getvalue()
