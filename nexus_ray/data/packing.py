"""Tokenising documents and packing them into sequences of one length.

Documents are joined by the end-of-text token and cut every `length` tokens. Neighbouring sequences share one
token: the last of one is the first of the next, so that every token of the text is predicted exactly once,
as in lm-eval's rolling log-likelihood. The last sequence of a shard is padded. What is not to be predicted, such as
what users say to an assistant, stands in the sequences but is no target.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from nexus_ray.config import Predict
from nexus_ray.data.assistant import EncodedDocument, encode_predicted
from nexus_ray.data.documents import OnUnreadable, read_documents, refuse
from nexus_ray.data.sources import Shard
from nexus_ray.errors import DataError


@dataclass(frozen=True)
class PackedSequence:
    """Tokens of one sequence.

    Attributes:
        input_ids: [length] int32, padded at the end with the separator.
        num_tokens: tokens before the padding.
        predicted: [length] false on tokens that are not to be predicted; None: all are.
    """

    input_ids: NDArray[np.int32]
    num_tokens: int
    predicted: NDArray[np.bool_] | None = None

    @property
    def is_target(self) -> NDArray[np.bool_]:
        """[length] true where the token is predicted from the ones before it: never on the first, nor on padding."""
        return _targets(np.arange(len(self.input_ids)) < self.num_tokens, self.predicted)


@dataclass(frozen=True)
class Batch:
    """Packed sequences side by side.

    Attributes:
        input_ids: [sequences, length] int32.
        num_tokens: [sequences] int32.
        predicted: [sequences, length] as of a `PackedSequence`.
    """

    input_ids: NDArray[np.int32]
    num_tokens: NDArray[np.int32]
    predicted: NDArray[np.bool_] | None = None

    @property
    def valid(self) -> NDArray[np.bool_]:
        """[sequences, length] true where a token stands, false on padding."""
        return np.arange(self.input_ids.shape[1]) < self.num_tokens[:, None]

    @property
    def is_target(self) -> NDArray[np.bool_]:
        """[sequences, length] true where the token is predicted from the ones before it."""
        return _targets(self.valid, self.predicted)

    def rows(self, chosen: slice) -> Batch:
        """Some of the sequences."""
        predicted = None if self.predicted is None else self.predicted[chosen]
        return Batch(self.input_ids[chosen], self.num_tokens[chosen], predicted)


def _targets(valid: NDArray[np.bool_], predicted: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    mask = valid.copy() if predicted is None else valid & predicted
    mask[..., 0] = False
    return mask


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token between documents: end-of-text where the vocabulary has it, else end-of-sequence."""
    token = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if not isinstance(token, int):
        raise DataError("the tokenizer has neither <|endoftext|> nor an end-of-sequence token")
    return token


def pack(token_lists: Iterable[list[int]], length: int, separator: int) -> Iterator[PackedSequence]:
    """`pack_documents` of documents all of whose tokens are predicted."""
    return pack_documents((EncodedDocument(tokens) for tokens in token_lists), length, separator)


def pack_documents(documents: Iterable[EncodedDocument], length: int, separator: int) -> Iterator[PackedSequence]:
    """Join documents with `separator` and cut them into sequences of `length` that overlap by one token.

    A separator stands before the first document, so that its first token is predicted too. A rest of a
    single token holds no target and is dropped: it is the overlap, already counted.
    """
    ids, predicted = [separator], [False]
    for document in documents:
        ids += [*document.ids, separator]
        ends = document.predicted is None
        predicted += [*([True] * len(document.ids) if document.predicted is None else document.predicted), ends]
        start = 0
        while start + length <= len(ids):
            yield _sequence(ids[start : start + length], predicted[start : start + length], length, separator)
            start += length - 1
        del ids[:start], predicted[:start]
    if len(ids) > 1:
        yield _sequence(ids, predicted, length, separator)


def _sequence(ids: list[int], predicted: list[bool], length: int, separator: int) -> PackedSequence:
    """A sequence, padded to `length`."""
    padding = length - len(ids)
    return PackedSequence(
        np.asarray(ids + [separator] * padding, dtype=np.int32),
        len(ids),
        np.asarray(predicted + [False] * padding, dtype=np.bool_),
    )


def pack_shard(
    shard: Shard,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    on_unreadable: OnUnreadable | None = None,
    predict: Predict = "all",
) -> Iterator[PackedSequence]:
    """Read, tokenise and pack one shard.

    Args:
        shard: what to read.
        tokenizer: of the model.
        length: tokens of a sequence.
        on_unreadable: called with an error that names the place, for each row that cannot be read or that the chat
            template refuses; the row is passed over. Without it the first such error is raised.
        predict: which tokens are targets, as the source's `predict` says.

    Raises:
        ModelError: the chat template is missing, or does not say what the assistant writes.
    """
    documents = _encoded(shard, tokenizer, on_unreadable or refuse, predict)
    return pack_documents(documents, length, separator_id(tokenizer))


def _encoded(
    shard: Shard, tokenizer: PreTrainedTokenizerBase, on_unreadable: OnUnreadable, predict: Predict
) -> Iterator[EncodedDocument]:
    for document in read_documents(shard, on_unreadable):
        try:
            encoded = encode_predicted(tokenizer, document, predict)
        except DataError as error:
            on_unreadable(DataError(f"{document.place}: {error.message}", error.hint))
            continue
        yield encoded


def batches(sequences: Iterable[PackedSequence], size: int) -> Iterator[Batch]:
    """Group sequences, in order, into batches of at most `size`."""
    group: list[PackedSequence] = []
    for sequence in sequences:
        group.append(sequence)
        if len(group) == size:
            yield _stack(group)
            group = []
    if group:
        yield _stack(group)


def _stack(group: list[PackedSequence]) -> Batch:
    return Batch(
        np.stack([sequence.input_ids for sequence in group]),
        np.asarray([sequence.num_tokens for sequence in group], dtype=np.int32),
        np.stack([sequence.is_target for sequence in group]),
    )


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """[vocabulary] UTF-8 bytes that each token stands for; special tokens stand for none.

    Byte-level BPE writes each byte as one character of its alphabet, so a token's length in characters is its
    length in bytes.
    """
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    for token, index in tokenizer.get_vocab().items():
        if token not in special:
            lengths[index] = len(token)
    return lengths
