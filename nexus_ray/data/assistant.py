"""Which tokens of a document are predicted: all, or those that the assistant of a conversation wrote.

A turn of the assistant is what follows the prompt that asks for it, up to and with the token that ends it: what the
model has to write when it serves the same conversation. Templates that mark it say so themselves; in the harmony format
of GPT-OSS it can be read from the tokens (https://cookbook.openai.com/articles/openai-harmony).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from nexus_ray.config import Predict
from nexus_ray.data.encoding import chat_template, encode_document
from nexus_ray.data.row_forms import Document
from nexus_ray.errors import DataError, ModelError

_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_AUTHOR = "assistant"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")


@dataclass(frozen=True)
class EncodedDocument:
    """Tokens of a document.

    Attributes:
        ids: without separators.
        predicted: for each token whether it is predicted; None: all are, and the separator after them too.
    """

    ids: list[int]
    predicted: list[bool] | None = None


def encode_predicted(tokenizer: PreTrainedTokenizerBase, document: Document, predict: Predict) -> EncodedDocument:
    """Token ids of a document, and which of them are predicted. Of plain text, which has no author, all are.

    Raises:
        DataError: the chat template refuses the messages, or control tokens in them hide who wrote what.
        ModelError: there is no template, or it does not say what the assistant writes.
    """
    ids = encode_document(tokenizer, document)
    if predict == "all" or document.messages is None:
        return EncodedDocument(ids)
    template = chat_template(tokenizer, pin_date=True)
    if _MARKED.search(template):
        return EncodedDocument(ids, _marked(tokenizer, template, document, ids))
    if f"<|start|>{_AUTHOR}" in template:
        return EncodedDocument(ids, _Harmony.of(tokenizer).written_by_assistant(ids))
    raise ModelError(
        "the chat template does not say which tokens the assistant writes",
        "put {% generation %} and {% endgeneration %} around them in the model directory's chat_template.jinja, "
        "or set data.sources.NAME.predict=all",
    )


def _marked(tokenizer: PreTrainedTokenizerBase, template: str, document: Document, ids: list[int]) -> list[bool]:
    """What the template marks as generated.

    Transformers finds it only in messages whose control tokens are not neutralised: where that gives other tokens, it
    would be of another text.
    """
    options: dict[str, Any] = {"chat_template": template, "return_dict": True, "return_assistant_tokens_mask": True}
    tools = list(document.tools) if document.tools else None
    found = tokenizer.apply_chat_template(list(document.messages or ()), tools=tools, **options)
    if list(found["input_ids"]) != ids:
        raise DataError(
            "a message holds a control token, which hides what the assistant wrote",
            "take it out, or set data.sources.NAME.predict=all",
        )
    return [bool(generated) for generated in found["assistant_masks"]]


@dataclass(frozen=True)
class _Harmony:
    """Ids of the tokens that bound messages of the harmony format.

    Attributes:
        start: begins a message; its author follows.
        author: the assistant's name.
        message: ends the header.
        end: ends a message, not the turn where it was no final one.
        ends: any of these ends a message.
        final: the channel of the last message of a turn, with the token that announces a channel.
    """

    start: int
    author: tuple[int, ...]
    message: int
    end: int
    ends: frozenset[int]
    final: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Self:
        ids = tokenizer.get_added_vocab()
        missing = [token for token in ("<|start|>", "<|channel|>", "<|message|>", "<|end|>") if token not in ids]
        if missing:
            raise ModelError(
                f"the chat template is in the harmony format, but the tokenizer lacks {', '.join(missing)}",
                "copy the model's own tokenizer.json into its directory",
            )
        author, final = (tuple(tokenizer.encode(word, add_special_tokens=False)) for word in (_AUTHOR, "final"))
        ends = frozenset(ids[token] for token in _ENDS if token in ids)
        return cls(ids["<|start|>"], author, ids["<|message|>"], ids["<|end|>"], ends, (ids["<|channel|>"], *final))

    def written_by_assistant(self, ids: Sequence[int]) -> list[bool]:
        """Whether each token is part of a turn of the assistant."""
        predicted = [False] * len(ids)
        starts = [place for place, token in enumerate(ids) if token == self.start]
        continues = False
        for begin, following in pairwise([*starts, len(ids)]):
            message = ids[begin:following]
            if not self._is_by_assistant(message):
                continues = False
                continue
            stop = next((place for place, token in enumerate(message, 1) if token in self.ends), len(message))
            first = 0 if continues else 1 + len(self.author)
            predicted[begin + first : begin + stop] = [True] * (stop - first)
            continues = message[stop - 1] == self.end and not self._is_final(message)
        return predicted

    def _is_by_assistant(self, message: Sequence[int]) -> bool:
        return tuple(message[1 : 1 + len(self.author)]) == self.author

    def _is_final(self, message: Sequence[int]) -> bool:
        """Whether the model stops after it: its channel is final, or it names none."""
        header = tuple(message[: list(message).index(self.message)] if self.message in message else message)
        announces = self.final[0]
        if announces not in header:
            return True
        place = header.index(announces)
        return header[place : place + len(self.final)] == self.final
