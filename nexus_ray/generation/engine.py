"""The interface of an engine: token ids in, tokens and log-probabilities out, for several models at once.

An engine knows nothing of text, chats or HTTP. `batching.engine.BatchingEngine` is the default one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from nexus_ray.generation.request import Continuation, ScoringRequest, TokenChoice, TokenEvent, TokenRequest
from nexus_ray.storage import Place


@dataclass(frozen=True)
class EngineState:
    """What an engine is doing.

    Attributes:
        running: requests for tokens that have not ended, those that wait included.
        scoring: scoring requests that have not ended.
        generated_tokens: tokens generated since the start.
        prompt_tokens: tokens of prompts taken in since the start.
        scored_tokens: tokens scored since the start.
        step_seconds: how long the present forward pass has been running; 0 when there is none.
    """

    running: int
    scoring: int
    generated_tokens: int
    prompt_tokens: int
    scored_tokens: int
    step_seconds: float


class Engine(Protocol):
    """Continues and scores token ids with a base and its overlays."""

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, the base first."""
        ...

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt with its continuation."""
        ...

    @property
    def longest_window(self) -> int:
        """Most tokens of one scoring request."""
        ...

    @property
    def places(self) -> int:
        """Requests that wait or run at one time at most."""
        ...

    def submit(self, request: TokenRequest, emit: Callable[[TokenEvent], None] | None = None) -> Continuation:
        """Queue a continuation.

        Args:
            request: it must fit the context.
            emit: takes each event on the engine's thread: tokens, then None at the end or the exception that ended
                it. Without it, iterate over the result.

        Raises:
            UnknownModelError: the model is not served.
            BusyError: the queue is full.
            ClosedError: the engine is shutting down.
        """
        ...

    def score(self, requests: Sequence[ScoringRequest], cancelled: threading.Event) -> Future[list[list[TokenChoice]]]:
        """Queue the scoring of given tokens.

        Args:
            requests: each of at most `longest_window` tokens.
            cancelled: set it to abandon the work; the future then fails with InterruptedError.

        Returns:
            for each request a `TokenChoice` for each of its targets.

        Raises:
            UnknownModelError, BusyError, ClosedError: as `submit`.
        """
        ...

    def serve(self, overlays: Mapping[str, Place]) -> None:
        """From now on serve these overlays beside the base; requests that run keep what they began with.

        Raises:
            ArtefactError: one is missing, damaged or belongs to another base; nothing has changed then.
        """
        ...

    def state(self) -> EngineState:
        """What the engine is doing. May be called at any time, also when it is stuck."""
        ...

    def check(self) -> None:
        """Whether the engine is able to work.

        Raises:
            NexusError: it is stuck in a forward pass, or has failed.
        """
        ...

    def close(self) -> None:
        """Stop what is running, refuse what is waiting, and wait for the engine's threads to end."""
        ...
