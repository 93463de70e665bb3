"""Scoring given tokens: windows of all callers and all models, batched by length, between the steps of generation.

A pass has at most so many tokens as the engine allows, so that those who wait for tokens wait no longer than for a
prompt. The LM head is computed for the scored positions only, some at a time: no logits are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nexus_ray.generation.request import ClosedError, ScoringRequest, TokenChoice
from nexus_ray.modeling.head import chunks, logits_of
from nexus_ray.modeling.loading import LoadedModel
from nexus_ray.modeling.overlay_rows import ServedOverlay

Item = tuple[ScoringRequest, ServedOverlay | None]
_LOOK_AHEAD = 1024  # waiting windows among which those of similar length are sought: long queues cost no time
Alone = Callable[[Sequence[tuple[ServedOverlay | None, int]], Callable[[], Any]], Any]


@dataclass
class _Job:
    """One call of `submit`."""

    future: Future[list[list[TokenChoice]]]
    cancelled: threading.Event
    results: list[list[TokenChoice]] = field(default_factory=list)
    missing: int = 0


@dataclass(frozen=True)
class _Window:
    """One request of a job."""

    job: _Job
    place: int
    request: ScoringRequest
    overlay: ServedOverlay | None


class BatchScorer:
    """Scores windows on a thread of its own.

    Args:
        base: the model.
        alone: runs a pass with overlays for its rows while no other pass runs.
        batch_tokens: tokens of a pass, padding included; a longer window is a pass of its own.

    Attributes:
        scored_tokens: targets scored since the start.
    """

    def __init__(self, base: LoadedModel, alone: Alone, batch_tokens: int) -> None:
        self.scored_tokens = 0
        self._base = base
        self._alone = alone
        self._batch_tokens = batch_tokens
        self._windows: list[_Window] = []
        self._jobs: dict[int, _Job] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._failed = False  # a job has, and its other windows may still wait
        self._thread = threading.Thread(target=self._run, name="scoring", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Its thread works."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Calls that have not ended."""
        return len(self._jobs)

    def submit(self, items: Sequence[Item], cancelled: threading.Event) -> Future[list[list[TokenChoice]]]:
        """Queue windows; see `Engine.score`."""
        job = _Job(Future(), cancelled, [[] for _ in items], len(items))
        job.future.set_running_or_notify_cancel()  # only `cancelled` ends it: nobody else may complete the future
        if not items:
            job.future.set_result([])
            return job.future
        with self._changed:
            self._jobs[id(job)] = job
            self._windows += [_Window(job, place, *item) for place, item in enumerate(items)]
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Refuse what waits and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._windows or self._closing)
                closing = self._closing
                batch, self._windows = (self._windows, []) if closing else (self._next_batch(), self._windows)
            if closing:
                for window in batch:
                    self._fail(window.job, ClosedError("the service is shutting down"))
                return
            self._score(batch)

    def _next_batch(self) -> list[_Window]:
        """Take the oldest window and others of similar length, as many as fit a pass; abandoned ones are dropped."""
        for job in list(self._jobs.values()):
            if job.cancelled.is_set():
                self._fail(job, InterruptedError("abandoned"))
        if self._failed:
            self._windows = [window for window in self._windows if not window.job.future.done()]
            self._failed = False
        if not self._windows:
            return []
        near = self._windows[:_LOOK_AHEAD]
        oldest = len(near[0].request.inputs)
        batch, longest = near[:1], oldest
        for window in sorted(near[1:], key=lambda window: abs(len(window.request.inputs) - oldest)):
            longest = max(longest, len(window.request.inputs))
            if longest * (len(batch) + 1) > self._batch_tokens:
                break
            batch.append(window)
        taken = set(map(id, batch))
        self._windows[:_LOOK_AHEAD] = [window for window in near if id(window) not in taken]
        return batch

    def _score(self, batch: list[_Window]) -> None:
        if not batch:
            return
        try:
            longest = max(len(window.request.inputs) for window in batch)
            segments = [(window.overlay, longest) for window in batch]
            results = self._alone(segments, lambda: score_windows(self._base, [window.request for window in batch]))
        except Exception as error:
            for window in batch:
                self._fail(window.job, error)
            return
        for window, result in zip(batch, results, strict=True):
            self.scored_tokens += len(result)
            job = window.job
            job.results[window.place] = result
            job.missing -= 1
            if job.missing == 0 and not job.future.done():
                del self._jobs[id(job)]
                job.future.set_result(job.results)

    def _fail(self, job: _Job, error: Exception) -> None:
        self._failed = self._jobs.pop(id(job), None) is not None or self._failed
        if not job.future.done():
            job.future.set_exception(error)


@torch.inference_mode()
def score_windows(base: LoadedModel, requests: Sequence[ScoringRequest]) -> list[list[TokenChoice]]:
    """Log-probabilities, in nats, of the targets of some windows, in one pass.

    Args:
        base: the model, with whatever overlays its rows have now.
        requests: windows, padded to the longest.
    """
    longest = max(len(request.inputs) for request in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.long)
    valid = torch.zeros(len(requests), longest, dtype=torch.bool)
    for row, request in enumerate(requests):
        ids[row, : len(request.inputs)] = torch.tensor(request.inputs)
        valid[row, : len(request.inputs)] = True
    output = base.model.base_model(
        input_ids=ids.to(base.device), attention_mask=valid.long().to(base.device), use_cache=False
    )
    hidden = output.last_hidden_state
    return [_choices(base, hidden[row], request) for row, request in enumerate(requests)]


def _choices(base: LoadedModel, hidden: Tensor, request: ScoringRequest) -> list[TokenChoice]:
    """The targets of one window, and the token that follows if asked for, from its hidden states [length, hidden]."""
    given: list[int | None] = [*request.targets, *([None] if request.follow else [])]
    hidden = hidden[len(request.inputs) - len(given) : len(request.inputs)]
    choices: list[TokenChoice] = []
    for part in chunks(hidden, int(base.config["vocab_size"])):
        log_probs = logits_of(hidden[part], base.head).log_softmax(dim=-1)
        choices += _named(log_probs, given[part], request.alternatives)
    return choices


def _named(log_probs: Tensor, targets: Sequence[int | None], alternatives: int) -> list[TokenChoice]:
    """A choice for each row of [positions, vocabulary]; the most likely one where there is no target."""
    best = log_probs.argmax(dim=-1).tolist()
    ids = [most_likely if target is None else target for target, most_likely in zip(targets, best, strict=True)]
    chosen = log_probs.gather(1, torch.tensor(ids, device=log_probs.device)[:, None])[:, 0].tolist()
    top = log_probs.topk(min(alternatives, log_probs.shape[-1]), dim=-1)
    tops = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenChoice(id_, logprob, tuple(zip(tokens, values, strict=True)))
        for id_, logprob, (tokens, values) in zip(ids, chosen, tops, strict=True)
    ]
