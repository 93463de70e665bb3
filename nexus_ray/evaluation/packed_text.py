"""Held-out text as it is trained on: documents joined by a separator and cut into sequences, each of them a unit."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from nexus_ray.data.assistant import EncodedDocument
from nexus_ray.data.packing import Batch, PackedSequence, batches, pack_documents, separator_id, token_byte_lengths
from nexus_ray.evaluation.scored_text import IGNORED, Encoded, Part, ScoringBatch, Wordless, grouped
from nexus_ray.evaluation.text_units import words_of_tokens
from nexus_ray.router.halves import halves_of_shard

_Pair = tuple[PackedSequence, PackedSequence]  # of tokens, and of the words counted at each of them


class PackedText:
    """Lays out a shard's documents as packed sequences.

    Separators after documents are predicted too: they are tokens, and stand for no words and no bytes.

    Args:
        tokenizer: of the model.
        length: tokens of a sequence.
        batch_rows: sequences of one forward pass.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, batch_rows: int) -> None:
        self._separator = separator_id(tokenizer)
        self._byte_lengths = token_byte_lengths(tokenizer)
        self._length = length
        self._batch_rows = batch_rows

    def __call__(self, documents: Iterable[Encoded], part: Part, wordless: Wordless) -> Iterator[ScoringBatch]:
        """The batches of one shard, in the order of the text."""
        texts, counted = itertools.tee(documents)
        tokens = pack_documents((encoded for _, encoded in texts), self._length, self._separator)
        # Words are packed as the tokens are: a sequence has those of the tokens that it predicts.
        counts = (EncodedDocument(self._words(entry, wordless)) for entry in counted)
        words = pack_documents(counts, self._length, 0)
        pairs, halves = _with_halves(itertools.islice(zip(tokens, words, strict=True), part.limit), part.first_half)
        first = 0
        for group in grouped(pairs, self._batch_rows):
            rows = _Rows(first, list(itertools.islice(halves, len(group))), part.place)
            yield self._batch(group, rows)
            first += len(group)

    def _words(self, entry: Encoded, wordless: Wordless) -> list[int]:
        document, encoded = entry
        if not encoded.ids:
            return []
        words = None
        if document.text is not None:
            words = words_of_tokens(document.text, self._byte_lengths[encoded.ids])
        wordless.count += words is None
        return [0] * len(encoded.ids) if words is None else words.tolist()

    def _batch(self, pairs: list[_Pair], rows: _Rows) -> ScoringBatch:
        [tokens] = batches((sequence for sequence, _ in pairs), len(pairs))
        words = np.stack([counts.input_ids for _, counts in pairs])
        labels = np.full(tokens.input_ids.shape, IGNORED, np.int64)
        labels[:, :-1] = np.where(tokens.is_target, tokens.input_ids, IGNORED)[:, 1:]
        numbers = rows.first + np.arange(len(pairs))
        return ScoringBatch(
            input_ids=tokens.input_ids,
            valid=tokens.valid,
            labels=labels,
            observed=tokens.valid,
            units=numbers,
            halves=np.asarray(rows.halves),
            num_bytes=_on_targets(tokens, self._byte_lengths[tokens.input_ids]),
            words=_on_targets(tokens, words),
            names=[f"{number} of {rows.place}" for number in numbers],
        )


@dataclass(frozen=True)
class _Rows:
    """Of the sequences of a batch: the number of the first, their halves, and where they come from."""

    first: int
    halves: list[int]
    place: str


def _on_targets(batch: Batch, amounts: NDArray[np.integer]) -> NDArray[np.int64]:
    """[sequences] sums over the targets of [sequences, length] amounts."""
    return np.where(batch.is_target, amounts, 0).sum(axis=1, dtype=np.int64)


def _with_halves(pairs: Iterable[_Pair], first_half: float) -> tuple[Iterable[_Pair], Iterator[int]]:
    """The sequences of a shard and the half of each; only a shard that is cut has to be packed to its end first."""
    if first_half in (0, 1):
        return pairs, itertools.repeat(1 - int(first_half))
    packed = list(pairs)
    num_tokens = np.asarray([tokens.num_tokens for tokens, _ in packed], np.int32)
    return packed, iter(halves_of_shard(num_tokens, first_half).tolist())
