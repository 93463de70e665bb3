"""`BatchingEngine`: transformers' continuous batching over one base, each request with its own overlay."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from nexus_ray.errors import ConfigError, NexusError
from nexus_ray.generation.batching.paged import (
    BatchLimits,
    accepts,
    ensure_running,
    paged_manager,
    plans_of,
    requests_of,
)
from nexus_ray.generation.batching.sampling import Draw, RowSampler
from nexus_ray.generation.batching.scoring import BatchScorer
from nexus_ray.generation.engine import EngineState
from nexus_ray.generation.request import (
    BASE,
    BusyError,
    ClosedError,
    Continuation,
    ScoringRequest,
    TokenChoice,
    TokenEvent,
    TokenRequest,
    UnknownModelError,
)
from nexus_ray.modeling.loading import LoadedModel
from nexus_ray.modeling.overlay_rows import OverlayRows, ServedOverlay, read_overlay
from nexus_ray.storage import Place

_MOST_SALTS = 10_000  # times a vocabulary of 200,000 still fits the 32 bits of transformers' token ids
_STARTS = 3  # of transformers' loop for one request


@dataclass(frozen=True)
class _Model:
    """What requests of one model compute with.

    Attributes:
        overlay: None for the base.
        salt: differs for each overlay that was ever loaded.
    """

    overlay: ServedOverlay | None
    salt: int


@dataclass
class _Running:
    """One request on its way."""

    request: TokenRequest
    model: _Model
    draw: Draw
    continuation: Continuation
    generated: int = 0


class BatchingEngine:
    """Continues and scores token ids; see `Engine`.

    Args:
        base: loaded without an overlay, on one device; the engine adds hooks to it and sets its attention.
        overlays: directories of overlays by name.
        limits: how much at one time.

    Raises:
        ArtefactError: an overlay is missing, damaged or belongs to another base.
    """

    def __init__(
        self, base: LoadedModel, overlays: Mapping[str, Place] | None = None, limits: BatchLimits | None = None
    ) -> None:
        self.base = base
        self.limits = limits or BatchLimits()
        self._models = {BASE: _Model(None, 0)}
        self._by_salt: dict[int, ServedOverlay | None] = {}
        self._salts = itertools.count(1)
        self._running: dict[str, _Running] = {}
        self._numbers = itertools.count()
        self._admission = threading.Lock()
        self._starting = threading.Lock()
        self._closing = False
        self._generated_tokens = self._prompt_tokens = 0
        self._step_began: float | None = None
        self._progress = time.monotonic()
        self.serve(overlays or {})
        self._rows = OverlayRows(base)
        self._manager = paged_manager(base, self.limits, RowSampler(self._draw_of, self._emit), self._deliver)
        self._hooks = (
            base.model.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            base.model.register_forward_hook(self._after_pass, always_call=True),
        )
        self._scorer = BatchScorer(base, self._score_alone, self.limits.batch_tokens)
        self._manager.start()

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models, the base first."""
        return tuple(self._models)

    @property
    def context_length(self) -> int:
        """Most tokens of a prompt with its continuation."""
        return min(int(self.base.config["max_position_embeddings"]), self.limits.cache_tokens)

    @property
    def longest_window(self) -> int:
        """Most tokens of one scoring request."""
        return min(self.context_length, self.limits.window_tokens)

    @property
    def places(self) -> int:
        """Requests that wait or run at one time at most."""
        return self.limits.requests

    def submit(self, request: TokenRequest, emit: Callable[[TokenEvent], None] | None = None) -> Continuation:
        """Queue a continuation; see `Engine`."""
        number = str(next(self._numbers))
        continuation = Continuation(lambda: self._end(number, None), emit)
        with self._admission:
            model = self._model(request.model)
            self._admit()
            if not self._running:
                self._progress = time.monotonic()
            self._running[number] = _Running(request, model, Draw(request), continuation)
            self._prompt_tokens += len(request.ids)
            self._hand_over(number, request, model)
        return continuation

    def _hand_over(self, number: str, request: TokenRequest, model: _Model) -> None:
        """Give a request to transformers' loop, which an error may end at any moment."""
        for _ in range(_STARTS):
            self._start()
            taken = self._manager.add_request(
                # The cache shares prefixes by token ids, which must not make an overlay read what another wrote.
                [id_ + model.salt * self._vocabulary for id_ in request.ids],
                request_id=number,
                max_new_tokens=request.max_tokens,
                eos_token_id=sorted(request.end_ids) or -1,
            )
            if taken is not None:
                self._start()  # an error after the loop last looked into its queue would leave the request there
                return
        self._running.pop(number)
        raise ClosedError("the engine does not start; its log says why")

    def score(self, requests: Sequence[ScoringRequest], cancelled: threading.Event) -> Future[list[list[TokenChoice]]]:
        """Queue the scoring of given tokens; see `Engine`."""
        overlays = [self._model(request.model).overlay for request in requests]
        with self._admission:
            self._admit()
            return self._scorer.submit(list(zip(requests, overlays, strict=True)), cancelled)

    def serve(self, overlays: Mapping[str, Place]) -> None:
        """From now on serve these overlays beside the base; see `Engine`."""
        if BASE in overlays:
            raise ConfigError(f"no overlay can be called {BASE!r}: that is the base", "choose another name")
        fresh = {name: read_overlay(self.base, path) for name, path in overlays.items()}
        models = {name: _Model(overlay, next(self._salts) % _MOST_SALTS + 1) for name, overlay in fresh.items()}
        with self._admission:
            self._models = {BASE: _Model(None, 0)} | models
            running = [running.model for running in list(self._running.values())]
            self._by_salt = {model.salt: model.overlay for model in (*self._models.values(), *running)}

    def state(self) -> EngineState:
        """What the engine is doing."""
        began = self._step_began
        return EngineState(
            running=len(self._running),
            scoring=self._scorer.waiting,
            generated_tokens=self._generated_tokens,
            prompt_tokens=self._prompt_tokens,
            scored_tokens=self._scorer.scored_tokens,
            step_seconds=0.0 if began is None else time.monotonic() - began,
        )

    def check(self) -> None:
        """Whether the engine is able to work; see `Engine`."""
        seconds = self.state().step_seconds
        if seconds > self.limits.stuck_seconds:
            raise NexusError(f"a forward pass has been running for {seconds:.0f} s", "restart the replica")
        idle = time.monotonic() - self._progress
        if self._running and idle > self.limits.stuck_seconds:
            raise NexusError(f"requests have been waiting for {idle:.0f} s without a pass", "restart the replica")
        if not self._scorer.alive:
            raise NexusError("the thread that scores has ended", "restart the replica")

    def close(self) -> None:
        """Stop what is running, refuse what is waiting, and wait for the engine's threads to end."""
        with self._admission:
            self._closing = True
        for number in list(self._running):
            self._end(number, ClosedError("the service is shutting down"))
        self._scorer.close()
        self._manager.stop(block=True, hard_stop=True)
        self._manager.destroy()
        self._rows.remove()
        for hook in self._hooks:
            hook.remove()

    @property
    def _vocabulary(self) -> int:
        return int(self.base.config["vocab_size"])

    def _model(self, name: str) -> _Model:
        models = self._models
        if name not in models:
            raise UnknownModelError.of(name, models)
        return models[name]

    def _start(self) -> None:
        """Start transformers' loop again if an error ended it, which was told to all who waited."""
        if not accepts(self._manager):
            with self._starting:  # not while a scoring pass is waiting for the loop to pause
                ensure_running(self._manager)

    def _admit(self) -> None:
        if self._closing:
            raise ClosedError("the service is shutting down")
        if len(self._running) + self._scorer.waiting >= self.limits.requests:
            raise BusyError(f"all {self.limits.requests} places of the queue are taken", "try again later")

    def _draw_of(self, number: str) -> Draw | None:
        running = self._running.get(number)
        if running is None:  # a cancellation that came before its request was taken in is forgotten: say it again
            self._manager.cancel_request(number)
            return None
        return running.draw

    def _emit(self, number: str, event: TokenChoice | Exception) -> None:
        """Hand out a token as soon as it is chosen; on the engine's thread."""
        running = self._running.get(number)
        if isinstance(event, Exception):
            self._end(number, event)
        elif running is not None:
            running.generated += 1
            self._generated_tokens += 1
            running.continuation.emit(event)
            request = running.request
            if event.id in request.end_ids or running.generated >= request.max_tokens:
                self._running.pop(number, None)
                running.continuation.emit(None)

    def _end(self, number: str, error: Exception | None) -> None:
        """End a request before its time."""
        running = self._running.pop(number, None)
        if running is not None:
            self._manager.cancel_request(number)
            running.continuation.emit(error)

    def _deliver(self, number: str, error: str | None) -> None:
        """transformers is done with a request; ours has ended before, unless it failed."""
        running = self._running.pop(number, None)
        if running is not None:
            running.continuation.emit(RuntimeError(error or "the engine ended this request"))

    def _before_pass(self, _model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before a forward pass over the paged cache: which token is whose, and what attends to what."""
        if kwargs.get("cache") is None:
            return None
        self._step_began = time.monotonic()
        requests = requests_of(self._manager)
        self._rows.assign([(self._overlay_of(future.state), future.query_length) for future in requests])
        kwargs["input_ids"] = kwargs["input_ids"] % self._vocabulary
        kwargs["plans"] = plans_of(kwargs, self.base)
        kwargs["attention_mask"] = dict.fromkeys(kwargs["plans"])  # none is made
        return args, kwargs

    def _overlay_of(self, state: Any) -> ServedOverlay | None:
        """By the salt in its prompt: a request that is cancelled by now still leaves in the cache what others use."""
        return self._by_salt.get(state.initial_tokens[0] // self._vocabulary)

    def _after_pass(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        self._step_began = None
        self._progress = time.monotonic()

    def _score_alone(self, segments: Sequence[tuple[ServedOverlay | None, int]], work: Callable[[], Any]) -> Any:
        """Run a scoring pass while no other pass runs."""
        with ExitStack() as stack:
            self._pause(stack)
            stack.enter_context(self._rows.assigned(segments))
            self._step_began = time.monotonic()
            try:
                return work()
            finally:
                self._step_began = None

    def _pause(self, stack: ExitStack) -> None:
        """Keep transformers' loop waiting for as long as the stack is open; start it first if an error ended it."""
        for last in (False, True):
            self._start()
            try:
                with self._starting:
                    stack.enter_context(self._manager.pause())
            except RuntimeError:  # it ended at this moment
                if last:
                    raise
            else:
                return
