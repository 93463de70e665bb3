"""What goes into an engine and what comes out: requests, tokens on their way, refusals."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from nexus_ray.errors import NexusError

BASE = "base"  # the model id of the base; every other model is an overlay on it


class ContextLengthError(NexusError):
    """Prompt and answer do not fit the model's context."""


class UnknownModelError(NexusError):
    """No model of that name is served."""

    @classmethod
    def of(cls, model: str, known: Iterable[str]) -> UnknownModelError:
        """The error for `model` where only `known` are served."""
        return cls(f"there is no model {model[:100]!r}; known: {', '.join(map(repr, known))}")


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
        seed: the same seed gives the same draws; None: a new one each time.
        alternatives: most likely tokens to name beside each chosen one, with log-probabilities; None: neither.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    alternatives: int | None = None


@dataclass(frozen=True)
class TokenRequest:
    """A prompt in token ids, and how to continue it.

    Attributes:
        ids: the prompt, at least one token.
        model: `BASE` or the name of an overlay.
        max_tokens: most tokens to generate, at least one.
        end_ids: any of these ends the continuation.
        temperature, top_p, seed, alternatives: as in `SamplingParams`.
    """

    ids: tuple[int, ...]
    model: str
    max_tokens: int
    end_ids: frozenset[int] = frozenset()
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    alternatives: int | None = None


@dataclass(frozen=True)
class TokenChoice:
    """One token, generated or given.

    Attributes:
        id: of the token.
        logprob: its log-probability under the model, in nats, before temperature and top_p; None if not asked for, or
            where there is nothing before it to predict it from.
        top: (id, logprob) of the most likely tokens in its place, best first; as many as were asked for.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


TokenEvent = TokenChoice | Exception | None


class Continuation:
    """Tokens on their way. Iterate to get them as they come; the iteration raises what ended them untimely."""

    def __init__(self, cancel: Callable[[], None], emit: Callable[[TokenEvent], None] | None = None) -> None:
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self.emit = emit or self._events.put
        self._cancel = cancel
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop generating before the next token, or before the first one. May be called at any time."""
        if not self._cancelled.is_set():
            self._cancelled.set()
            self._cancel()

    def __iter__(self) -> Iterator[TokenChoice]:
        while (event := self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event


@dataclass(frozen=True)
class ScoringRequest:
    """Given tokens whose probability is asked for.

    Attributes:
        inputs: tokens of one forward pass, at most the context.
        targets: what the predictions at the last `len(targets)` inputs are compared with.
        model: `BASE` or the name of an overlay.
        alternatives: most likely tokens to name in the place of each target.
        follow: the last input has no target: the most likely token after it is chosen, and comes last.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    model: str
    alternatives: int = 0
    follow: bool = False
