"""Perplexity of given texts under several models, by the conventions of lm-eval's rolling log-likelihood.

A text is predicted from a separator before it, in windows of `sequence_length` tokens, every token exactly once; what
follows the text is not predicted. Figures a word and a byte count those of the text itself.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from nexus_ray.errors import ArtefactError, ConfigError, DataError
from nexus_ray.evaluation.perplexity import bits_per_byte
from nexus_ray.evaluation.text_units import TextUnits, unit_perplexity
from nexus_ray.evaluation.windows import rolling_windows
from nexus_ray.generation.assistant import Assistant
from nexus_ray.generation.request import ScoringRequest, TokenChoice

_MOST_TOKENS = 4_000_000  # of one call


@dataclass(frozen=True)
class TextScore:
    """How well one model predicts one text. A perplexity is None where it is no finite number.

    Attributes:
        token_perplexity: exp(nats_per_token).
        word_perplexity: exp(nats / words).
        byte_perplexity: exp(nats / bytes).
        bits_per_byte: bits the model needs for each UTF-8 byte of the text.
        nats_per_token: mean negative log-likelihood.
        tokens: predicted tokens.
        words: of the text, between white space.
        bytes: of the text, UTF-8.
        token_logprobs: log-probability of each token, in nats.
    """

    token_perplexity: float | None
    word_perplexity: float | None
    byte_perplexity: float | None
    bits_per_byte: float
    nats_per_token: float
    tokens: int
    words: int
    bytes: int
    token_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class ScoredText:
    """One text under several models.

    Attributes:
        ids: its tokens.
        scores: by model.
    """

    ids: tuple[int, ...]
    scores: Mapping[str, TextScore]


class TextScorer:
    """Scores texts.

    Args:
        assistant: tokenises; its engine scores.
        sequence_length: tokens of a window unless a request says otherwise, as in `data.sequence_length`.
    """

    def __init__(self, assistant: Assistant, sequence_length: int) -> None:
        self._assistant = assistant
        self.sequence_length = min(sequence_length, assistant.engine.longest_window)

    def submit(
        self,
        texts: Sequence[str],
        models: Sequence[str],
        cancelled: threading.Event,
        *,
        sequence_length: int | None = None,
        stride: int | None = None,
    ) -> Future[list[ScoredText]]:
        """Queue the scoring of texts.

        Args:
            texts: non-empty texts.
            models: names of models.
            cancelled: set it to abandon the work.
            sequence_length: tokens of a window, at most the context; default: `self.sequence_length`.
            stride: tokens that a window after the first scores; default: all of them.

        Raises:
            DataError: a text is empty.
            ConfigError: windows do not fit the context or do not cover the text.
            UnknownModelError, BusyError, ClosedError: as `Engine.score`.
        """
        length = self._checked(sequence_length or self.sequence_length, stride)
        codec, engine = self._assistant.codec, self._assistant.engine
        encoded = [codec.encode(text) for text in texts]
        if not all(encoded):
            raise DataError("the text is empty: there is nothing to predict")
        read = sum(map(len, encoded)) * -(-length // (stride or length)) * len(models)
        if read > _MOST_TOKENS:
            raise DataError(
                f"{read} tokens would have to be read, overlaps and all models counted; at most {_MOST_TOKENS} are",
                "send less text, fewer models, or a larger stride",
            )
        requests, owners = [], []
        for index, ids in enumerate(encoded):
            for window in rolling_windows(ids, codec.separator, length, stride):
                for model in models:
                    requests.append(ScoringRequest(tuple(window.inputs), tuple(window.targets), model))
                    owners.append((index, model))
        scored: Future[list[ScoredText]] = Future()
        scored.set_running_or_notify_cancel()
        engine.score(requests, cancelled).add_done_callback(
            lambda done: _fulfil(scored, done, lambda choices: _collect(texts, encoded, models, owners, choices))
        )
        return scored

    def _checked(self, length: int, stride: int | None) -> int:
        longest = self._assistant.engine.longest_window
        if not 1 <= length <= longest:
            raise ConfigError(f"sequence_length is {length}, but this service reads at most {longest} tokens at once")
        if stride is not None and not 1 <= stride <= length:
            raise ConfigError(f"stride is {stride}; 1 to sequence_length ({length}) is needed")
        return length


def _fulfil(scored: Future[list[ScoredText]], done: Future[Any], collect: Callable[[Any], list[ScoredText]]) -> None:
    """Give `scored` what comes of `done`, be it an error."""
    try:
        scored.set_result(collect(done.result()))
    except Exception as error:
        scored.set_exception(error)


def _collect(
    texts: Sequence[str],
    encoded: Sequence[list[int]],
    models: Sequence[str],
    owners: Sequence[tuple[int, str]],
    choices: Sequence[Sequence[TokenChoice]],
) -> list[ScoredText]:
    log_probs: dict[tuple[int, str], list[float]] = {owner: [] for owner in owners}
    for owner, window in zip(owners, choices, strict=True):
        log_probs[owner] += [choice.logprob for choice in window if choice.logprob is not None]
    return [
        ScoredText(tuple(encoded[index]), {model: score_of(text, log_probs[index, model]) for model in models})
        for index, text in enumerate(texts)
    ]


def score_of(text: str, log_probs: Sequence[float]) -> TextScore:
    """The figures of a text from the log-probabilities of its tokens, in nats.

    Raises:
        ArtefactError: their sum is not a finite number.
    """
    nats, tokens = -math.fsum(log_probs), len(log_probs)
    if not math.isfinite(nats):
        raise ArtefactError("the model's loss on this text is not a finite number")
    units = TextUnits.of(text)
    return TextScore(
        token_perplexity=unit_perplexity(nats, tokens),
        word_perplexity=unit_perplexity(nats, units.words),
        byte_perplexity=unit_perplexity(nats, units.num_bytes),
        bits_per_byte=bits_per_byte(nats, units.num_bytes),
        nats_per_token=nats / tokens,
        tokens=tokens,
        words=units.words,
        bytes=units.num_bytes,
        token_logprobs=tuple(log_probs),
    )
