"""Perplexity of given texts, by the definition that the evaluation uses on held-out text.

A separator stands before and after the text, long texts are cut into overlapping sequences, and every token is
predicted exactly once. Two numbers of one text are comparable only for the same sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from nexus_ray.data.encoding import encode_document
from nexus_ray.data.packing import batches, pack, separator_id, token_byte_lengths
from nexus_ray.data.row_forms import Document
from nexus_ray.errors import ArtefactError, DataError
from nexus_ray.evaluation.perplexity import bits_per_byte, sequence_nats, target_bytes, token_perplexity
from nexus_ray.modeling.loading import LoadedModel


@dataclass(frozen=True)
class TextScore:
    """How well one model predicts one text.

    Attributes:
        token_perplexity: exp(nats_per_token).
        bits_per_byte: bits the model needs for each UTF-8 byte of the text.
        nats_per_token: mean negative log-likelihood.
        tokens: predicted tokens, the closing separator among them.
        bytes: UTF-8 bytes of the predicted tokens.
    """

    token_perplexity: float
    bits_per_byte: float
    nats_per_token: float
    tokens: int
    bytes: int


class Scorer:
    """Scores texts with a loaded model.

    Args:
        loaded: the model; call within `loaded.base()` to score with the base.
        sequence_length: tokens of a sequence, as in `data.sequence_length`.
        batch_sequences: sequences of one forward pass.

    Attributes:
        longest_token: UTF-8 bytes of the vocabulary's longest token.
    """

    def __init__(self, loaded: LoadedModel, sequence_length: int, batch_sequences: int) -> None:
        self._loaded = loaded
        self.sequence_length = min(sequence_length, int(loaded.config["max_position_embeddings"]))
        self._batch_sequences = batch_sequences
        self._byte_lengths = token_byte_lengths(loaded.tokenizer)
        self.longest_token = int(self._byte_lengths.max())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; what looks like a special token stays text.

        Raises:
            DataError: the text is empty.
        """
        ids = encode_document(self._loaded.tokenizer, Document(text=text))
        if not ids:
            raise DataError("the text is empty: there is nothing to predict")
        return ids

    def score(self, ids: list[int], should_stop: Callable[[], bool]) -> TextScore:
        """Score one text.

        Args:
            ids: its tokens, from `encode`.
            should_stop: asked before each forward pass; true abandons the work.

        Raises:
            InterruptedError: `should_stop` said so.
            ArtefactError: the model's loss is not a finite number.
        """
        totals = np.zeros(3)
        for nats, tokens, size in self._sums(ids, should_stop):
            totals += nats, tokens, size
        nats, tokens, size = float(totals[0]), int(totals[1]), int(totals[2])
        if not np.isfinite(nats):
            raise ArtefactError("the model's loss on this text is not a finite number")
        return TextScore(token_perplexity(nats, tokens), bits_per_byte(nats, size), nats / tokens, tokens, size)

    def _sums(self, ids: list[int], should_stop: Callable[[], bool]) -> Iterator[tuple[float, int, int]]:
        """(nats, targets, bytes) of each batch of the text's sequences."""
        sequences = pack([ids], self.sequence_length, separator_id(self._loaded.tokenizer))
        for batch in batches(sequences, self._batch_sequences):
            if should_stop():
                raise InterruptedError("abandoned")
            logits, _ = self._loaded.forward_batch(batch)
            size = target_bytes(batch, self._byte_lengths).sum()
            nats = float(sequence_nats(logits, batch).sum())
            del logits  # not beside the next batch's
            yield nats, int(batch.is_target.sum()), int(size)
