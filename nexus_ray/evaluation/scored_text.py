"""What is scored of a shard, as rows of forward passes: token ids, what each position predicts, words and bytes of it.

A unit is what the bootstrap resamples: a packed sequence, or a document that rolling windows go through.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from nexus_ray.config import Predict
from nexus_ray.data.assistant import EncodedDocument, encode_predicted
from nexus_ray.data.documents import OnUnreadable, read_documents
from nexus_ray.data.row_forms import Document
from nexus_ray.data.sources import Shard
from nexus_ray.errors import DataError

IGNORED = -100  # a label that is not scored, as torch's cross-entropy has it
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class ScoringBatch:
    """Rows of one forward pass. Words and bytes of a unit that has several rows stand in the first of them.

    Attributes:
        input_ids: [rows, length] int32, padded at the end.
        valid: [rows, length] true where a token stands.
        labels: [rows, length] int64, the token that each position has to predict; `IGNORED` where none is scored.
        observed: [rows, length] positions whose routing counts.
        units: [rows] number of the unit within the shard.
        halves: [rows] 0 or 1, the half of the source's text that the row belongs to.
        num_bytes: [rows] UTF-8 bytes of what is predicted.
        words: [rows] words of it.
        names: of the rows, to follow the word "sequence" in messages.
    """

    input_ids: NDArray[np.int32]
    valid: NDArray[np.bool_]
    labels: NDArray[np.int64]
    observed: NDArray[np.bool_]
    units: NDArray[np.int64]
    halves: NDArray[np.integer]
    num_bytes: NDArray[np.int64]
    words: NDArray[np.int64]
    names: list[str]


@dataclass(frozen=True)
class Part:
    """What is taken of a shard.

    Attributes:
        shard: what to read.
        limit: units from its beginning; None: all.
        first_half: how much of the text that is taken, from its beginning, is of the first half of its source.
        predict: which tokens are scored, as the source's `predict` says.
    """

    shard: Shard
    limit: int | None
    first_half: float
    predict: Predict = "all"

    @property
    def place(self) -> str:
        """The shard in messages."""
        return f"{self.shard.path}, {self.shard.start} to {self.shard.stop}"


@dataclass
class Wordless:
    """Counts documents whose words are not known.

    Those are conversations, whose text the chat template writes, and for packed sequences texts that the tokenizer
    changes.
    """

    count: int = 0


Encoded = tuple[Document, EncodedDocument]
Layout = Callable[[Iterable[Encoded], Part, Wordless], Iterator[ScoringBatch]]


def encode_documents(tokenizer: PreTrainedTokenizerBase, part: Part, on_unreadable: OnUnreadable) -> Iterator[Encoded]:
    """The documents of a shard with their tokens, in the order of the file.

    Args:
        tokenizer: of the model.
        part: names the shard and what is predicted.
        on_unreadable: called for each row that cannot be read or that the chat template refuses.
    """
    for document in read_documents(part.shard, on_unreadable):
        try:
            encoded = encode_predicted(tokenizer, document, part.predict)
        except DataError as error:
            on_unreadable(DataError(f"{document.place}: {error.message}", error.hint))
            continue
        yield document, encoded


def grouped(items: Iterable[ItemT], size: int) -> Iterator[list[ItemT]]:
    """Lists of at most `size` items, in order."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group
