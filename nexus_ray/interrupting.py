"""Ending from a thread what the main thread does."""

from __future__ import annotations

import signal
import threading


def interrupt_main_thread() -> None:
    """Do what Ctrl-C does; where it is ignored, as in what shell scripts start with `&`, what SIGTERM does.

    A signal also ends a wait for a lock, which `_thread.interrupt_main` does not. Where neither is handled, nothing
    happens.
    """
    handled = (number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number)))
    number = next(handled, None)
    if number is not None:
        signal.pthread_kill(threading.main_thread().ident or 0, number)
