"""What a person sees: one bar on a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from rich.console import Console

from nexus_ray import console
from nexus_ray.console import progress, setup_logging


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    package = logging.getLogger("nexus_ray")
    before = package.handlers, package.level, package.propagate
    yield
    package.handlers, package.level, package.propagate = before[0], before[1], before[2]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    output = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=output, force_terminal=True, width=100))
    return output


@pytest.fixture
def _pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "console", Console(file=io.StringIO(), force_terminal=False))


def log_three() -> None:
    logger = logging.getLogger("nexus_ray.some.module")
    logger.debug("a detail")
    logger.info("the news")
    logger.warning("a warning")


@pytest.mark.usefixtures("_pipe")
@pytest.mark.parametrize(
    ("flags", "seen"),
    [
        ({}, ["the news", "a warning"]),
        ({"verbose": True}, ["a detail", "the news", "a warning"]),
        ({"quiet": True}, ["a warning"]),
    ],
)
def test_levels(capsys, flags, seen):
    setup_logging(**flags)
    log_three()
    captured = capsys.readouterr()
    assert captured.out == "", "standard output is for results"
    assert [line.split(" ", 3)[3] for line in captured.err.splitlines()] == seen


@pytest.mark.usefixtures("_pipe")
def test_setting_up_twice_does_not_say_everything_twice(capsys):
    setup_logging()
    setup_logging()
    log_three()
    assert capsys.readouterr().err.count("the news") == 1


@pytest.mark.usefixtures("_pipe")
def test_in_a_pipe_progress_is_a_line_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 20.0, 21.0, 22.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    setup_logging()
    with progress("collect", total=4) as advance:
        for _ in range(4):
            advance(1)
    lines = [line.split(" INFO ")[1] for line in capsys.readouterr().err.splitlines()]
    # 20 s for 2 of 4 leaves 20 s; the last one is always said.
    assert lines == ["collect: 2 of 4, 20 s left", "collect: 4 of 4, 0 s left"]


def test_on_a_terminal_progress_is_a_bar(screen):
    setup_logging()
    with progress("collect", total=3) as advance:
        advance(1)
        advance(2)
    assert "collect" in screen.getvalue()
    assert "3/3" in screen.getvalue()


def test_quiet_draws_no_bar(screen):
    setup_logging(quiet=True)
    with progress("collect", total=3) as advance:
        advance(3)
    assert screen.getvalue() == ""


@pytest.mark.usefixtures("_pipe")
def test_nothing_to_do_is_no_error():
    with progress("collect", total=0) as advance:
        advance(0)
