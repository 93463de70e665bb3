"""What a command does when it is told to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from nexus_ray.cluster.session import _stop_as_on_ctrl_c


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_interrupts_also_where_a_shell_script_has_switched_ctrl_c_off(handler) -> None:
    signal.signal(signal.SIGINT, handler)
    _stop_as_on_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_goes_to_who_handles_ctrl_c() -> None:
    """While it trains, Ray Train does: it stops its workers first."""
    seen: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    signal.signal(signal.SIGINT, handle)
    _stop_as_on_ctrl_c()
    signal.raise_signal(signal.SIGTERM)
    assert seen == [signal.SIGINT]
