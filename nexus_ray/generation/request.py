"""What goes into the engine and what comes out: sampling parameters, prompts, answers on their way, refusals."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from nexus_ray.errors import NexusError
from nexus_ray.generation.text import Piece

Which = Literal["base", "student"]
FinishReason = Literal["stop", "length"]
Event = Piece | Exception | None


class ContextLengthError(NexusError):
    """Prompt and answer do not fit the model's context."""


class BusyError(NexusError):
    """As many requests as the engine holds are already waiting or running."""


class ClosedError(NexusError):
    """The engine is shutting down."""


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is generated.

    Attributes:
        max_tokens: most tokens to generate; None: 256, or what the context and the engine's limit leave.
        temperature: 0 is greedy.
        top_p: sample from the smallest set of tokens with at least this probability.
        stop: strings that end the answer; they are not part of it.
        seed: the same seed gives the same answer; None: a new one each time.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Prompt:
    """A request that was found to fit: token ids and how to continue them."""

    ids: list[int]
    which: Which
    max_tokens: int
    params: SamplingParams


class Generation:
    """An answer on its way. Iterate to get its pieces as they come.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated so far, headers and end tokens included.
        finish_reason: set when the answer is complete: stop, or length when `max_tokens` cut it.
    """

    def __init__(self, prompt_tokens: int, emit: Callable[[Event], None] | None = None) -> None:
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.emit = emit or self._events.put
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop generating before the next token, or before the first one. May be called at any time."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """`cancel` has been called."""
        return self._cancelled.is_set()

    def __iter__(self) -> Iterator[Piece]:
        while (event := self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
