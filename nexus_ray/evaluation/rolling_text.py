"""Held-out text as lm-eval scores it: each document on its own in rolling windows, each document a unit."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from nexus_ray.data.assistant import EncodedDocument
from nexus_ray.data.packing import separator_id, token_byte_lengths
from nexus_ray.data.row_forms import Document
from nexus_ray.evaluation.scored_text import IGNORED, Encoded, Part, ScoringBatch, Wordless, grouped
from nexus_ray.evaluation.text_units import TextUnits
from nexus_ray.evaluation.windows import Span, window_spans
from nexus_ray.router.halves import halves_of_shard


@dataclass(frozen=True)
class _Text:
    """A document with the prefix that its first token is predicted from.

    Attributes:
        ids: [1 + tokens] with the prefix.
        labels: [1 + tokens] the same, `IGNORED` where a token is not predicted.
        amount: words and bytes of what is predicted.
    """

    ids: NDArray[np.int32]
    labels: NDArray[np.int64]
    amount: TextUnits

    def __len__(self) -> int:
        return len(self.ids) - 1


class RollingText:
    """Lays out a shard's documents as rolling windows; documents without text are left out.

    Args:
        tokenizer: of the model; its separator is the prefix of every document.
        length: tokens that a window reads at most.
        stride: tokens that a window after the first scores; None: `length`.
        batch_rows: windows of one forward pass.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, stride: int | None, batch_rows: int) -> None:
        self._separator = separator_id(tokenizer)
        self._byte_lengths = token_byte_lengths(tokenizer)
        self._length = length
        self._stride = stride
        self._batch_rows = batch_rows

    def __call__(self, documents: Iterable[Encoded], part: Part, wordless: Wordless) -> Iterator[ScoringBatch]:
        """The batches of one shard: windows of similar length together, the longest first."""
        kept = itertools.islice((entry for entry in documents if entry[1].ids), part.limit)
        texts = [self._text(*entry, wordless) for entry in kept]
        windows = [
            (unit, span)
            for unit, text in enumerate(texts)
            for span in window_spans(len(text), self._length, self._stride)
        ]
        windows.sort(key=lambda window: window[1].start - window[1].stop)
        sizes = np.asarray([len(text) for text in texts], np.int32)
        halves = halves_of_shard(sizes, part.first_half)
        for group in grouped(windows, self._batch_rows):
            yield self._batch(group, texts, halves, part.place)

    def _text(self, document: Document, encoded: EncodedDocument, wordless: Wordless) -> _Text:
        ids = np.asarray([self._separator, *encoded.ids], np.int32)
        labels = ids.astype(np.int64)
        if encoded.predicted is not None:
            labels[1:][~np.asarray(encoded.predicted)] = IGNORED
        if document.text is not None:
            return _Text(ids, labels, TextUnits.of(document.text))
        wordless.count += 1
        predicted = ids[1:][labels[1:] != IGNORED]
        return _Text(ids, labels, TextUnits(0, int(self._byte_lengths[predicted].sum())))

    def _batch(
        self, windows: Sequence[tuple[int, Span]], texts: Sequence[_Text], halves: NDArray[np.int32], place: str
    ) -> ScoringBatch:
        lengths = np.asarray([span.stop - span.start for _, span in windows])
        valid = np.arange(lengths.max()) < lengths[:, None]
        input_ids = np.full(valid.shape, self._separator, np.int32)
        labels = np.full(valid.shape, IGNORED, np.int64)
        observed = np.zeros(valid.shape, np.bool_)
        for row, (unit, span) in enumerate(windows):
            text, length = texts[unit], span.stop - span.start
            input_ids[row, :length] = text.ids[span.start : span.stop]
            scored = slice(length - span.targets, length)
            labels[row, scored] = text.labels[span.stop - span.targets + 1 : span.stop + 1]
            observed[row, scored] = True
        units = np.asarray([unit for unit, _ in windows])
        amounts = [TextUnits(0, 0) if span.start else texts[unit].amount for unit, span in windows]
        return ScoringBatch(
            input_ids=input_ids,
            valid=valid,
            labels=labels,
            observed=observed,
            units=units,
            halves=halves[units],
            num_bytes=np.asarray([amount.num_bytes for amount in amounts]),
            words=np.asarray([amount.words for amount in amounts]),
            names=[f"at token {span.start} of document {unit} of {place}" for unit, span in windows],
        )
