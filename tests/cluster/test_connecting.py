"""What a command does when it is told to stop, and when the cluster that it is to join is not there or another."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import pytest
import ray
from ray._private.utils import check_version_info

from nexus_ray.cluster import ensure_ray, stop_as_on_ctrl_c
from nexus_ray.errors import NexusError


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_interrupts_also_where_a_shell_script_has_switched_ctrl_c_off(handler) -> None:
    signal.signal(signal.SIGINT, handler)
    stop_as_on_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_goes_to_who_handles_ctrl_c() -> None:
    """While it trains, Ray Train does: it stops its workers first."""
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    signal.signal(signal.SIGINT, handle)
    stop_as_on_ctrl_c()
    signal.raise_signal(signal.SIGTERM)
    assert seen == [signal.SIGINT]


def refuse(error: Exception) -> Callable[..., None]:
    def init(**_: object) -> None:
        raise error

    return init


def test_a_cluster_that_is_not_there_is_named_at_once(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse(AssertionError()))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(NexusError, match=rf"no Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:{port}"):
        ensure_ray()


@pytest.mark.parametrize("listens", [True, False])
def test_a_cluster_of_another_ray_or_python_is_refused_with_both_versions(listens: bool, monkeypatch) -> None:
    """Ray's own check, as it words it."""
    found = {"ray_version": "2.40.0", "python_version": "3.9.1"}
    with pytest.raises(RuntimeError) as said:
        check_version_info(found, "10.0.0.1")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse(said.value))
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}" if listens else "auto")
        with pytest.raises(NexusError, match=r"does not fit this process(.|\n)*2\.40\.0(.|\n)*3\.9\.1"):
            ensure_ray()


def test_a_ray_that_does_not_start_here_is_told_in_words(monkeypatch) -> None:
    late = Exception("The current node timed out during startup. This\ncould happen because ...")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse(late))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(NexusError, match="Ray has not started on this machine: The current node timed out") as caught:
        ensure_ray()
    assert "ray/session_latest/logs" in str(caught.value.hint)
