"""Tokenising documents and packing them into sequences of one length.

Documents are joined by the end-of-text token and cut every `length` tokens. Neighbouring sequences share one
token: the last of one is the first of the next, so that every token of the text is predicted exactly once,
as in lm-eval's rolling log-likelihood. The last sequence of a shard is padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from nexus_ray.data.documents import OnUnreadable, read_documents, refuse
from nexus_ray.data.row_forms import Document
from nexus_ray.data.sources import Shard
from nexus_ray.errors import DataError, ModelError

_USUAL_KEYS = frozenset(
    {"role", "content", "thinking", "reasoning_content", "name", "type", "id", "function", "arguments", "tool_calls"}
)
# A macro of this name takes the place of the global function that templates ask for the current date.
_PINNED_DATE = "{%- macro strftime_now(format) -%}2025-01-01{%- endmacro -%}"


@dataclass(frozen=True)
class PackedSequence:
    """Tokens of one sequence.

    Attributes:
        input_ids: [length] int32, padded at the end with the separator.
        num_tokens: tokens before the padding; positions 1..num_tokens-1 are targets.
    """

    input_ids: NDArray[np.int32]
    num_tokens: int


@dataclass(frozen=True)
class Batch:
    """Packed sequences side by side.

    Attributes:
        input_ids: [sequences, length] int32.
        num_tokens: [sequences] int32.
    """

    input_ids: NDArray[np.int32]
    num_tokens: NDArray[np.int32]

    @property
    def valid(self) -> NDArray[np.bool_]:
        """[sequences, length] true where a token stands, false on padding."""
        return np.arange(self.input_ids.shape[1]) < self.num_tokens[:, None]

    @property
    def is_target(self) -> NDArray[np.bool_]:
        """[sequences, length] true where the token is predicted from the ones before it."""
        mask = self.valid.copy()
        mask[:, 0] = False
        return mask


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token between documents: end-of-text where the vocabulary has it, else end-of-sequence."""
    token = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if not isinstance(token, int):
        raise DataError("the tokenizer has neither <|endoftext|> nor an end-of-sequence token")
    return token


def encode_document(tokenizer: PreTrainedTokenizerBase, document: Document) -> list[int]:
    """Token ids of a document. Conversations go through the model's own chat template; text that looks like a
    special token stays text."""
    if document.messages is not None:
        tools = list(document.tools) if document.tools else None
        return encode_messages(tokenizer, list(document.messages), tools=tools, pin_date=True)
    return list(tokenizer.encode(document.text or "", add_special_tokens=False, split_special_tokens=True))


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    prompt: bool = False,
    pin_date: bool = False,
) -> list[int]:
    """Token ids of a conversation rendered with the model's chat template.

    Args:
        tokenizer: the tokenizer that carries the template.
        messages: role and content, in order.
        tools: functions that the assistant may call, as JSON schemas.
        prompt: end with the header of the assistant's next turn.
        pin_date: let the template print a fixed date, so that training data is the same on every day.

    Raises:
        DataError: the template refuses the messages.
        ModelError: there is no template.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ModelError("the tokenizer has no chat template", "add chat_template.jinja to the model directory")
    _refuse_control_tokens_in_keys(tokenizer, [messages, tools])
    try:
        ids = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=_PINNED_DATE + template if pin_date else template,
            add_generation_prompt=prompt,
            return_dict=False,
            sanitize_control_tokens=True,  # a message must not be able to write <|end|>
        )
    except Exception as error:  # jinja raises whatever the template asks for
        raise DataError(f"the chat template refuses the messages: {error}") from error
    return list(ids)


def _refuse_control_tokens_in_keys(tokenizer: PreTrainedTokenizerBase, value: Any) -> None:
    """Templates print the keys of a call's arguments, which the tokenizer, unlike values, does not neutralise."""
    keys = set(_keys(value)) - _USUAL_KEYS
    tokens = tokenizer.get_added_vocab() if keys else {}
    for key in sorted(keys):
        if any(token in key for token in tokens):
            raise DataError(f"the field name {key!r} holds a control token", "rename the field")


def _keys(value: Any) -> Iterator[str]:
    """Names of all fields in a JSON value, however deep."""
    if isinstance(value, dict):
        yield from map(str, value)
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _keys(inner)


def pack(token_lists: Iterable[list[int]], length: int, separator: int) -> Iterator[PackedSequence]:
    """Join token lists with `separator` and cut them into sequences of `length` that overlap by one token.

    A separator stands before the first document, so that its first token is predicted too. A rest of a
    single token holds no target and is dropped: it is the overlap, already counted.
    """
    pending = [separator]
    for tokens in token_lists:
        pending += tokens
        pending.append(separator)
        start = 0
        while start + length <= len(pending):
            yield PackedSequence(np.asarray(pending[start : start + length], dtype=np.int32), length)
            start += length - 1
        del pending[:start]
    if len(pending) > 1:
        padded = np.full(length, separator, dtype=np.int32)
        padded[: len(pending)] = pending
        yield PackedSequence(padded, len(pending))


def pack_shard(
    shard: Shard, tokenizer: PreTrainedTokenizerBase, length: int, on_unreadable: OnUnreadable | None = None
) -> Iterator[PackedSequence]:
    """Read, tokenise and pack one shard.

    Args:
        shard: what to read.
        tokenizer: of the model.
        length: tokens of a sequence.
        on_unreadable: called with an error that names the place, for each row that cannot be read or that the chat
            template refuses; the row is passed over. Without it the first such error is raised.
    """
    return pack(_encoded(shard, tokenizer, on_unreadable or refuse), length, separator_id(tokenizer))


def _encoded(shard: Shard, tokenizer: PreTrainedTokenizerBase, on_unreadable: OnUnreadable) -> Iterator[list[int]]:
    for document in read_documents(shard, on_unreadable):
        try:
            ids = encode_document(tokenizer, document)
        except DataError as error:
            on_unreadable(DataError(f"{document.place}: {error.message}", error.hint))
            continue
        yield ids


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
