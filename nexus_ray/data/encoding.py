"""From documents to token ids: plain text as it is, conversations through the model's own chat template.

Text can never become a control token, whatever it looks like.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from nexus_ray.data.row_forms import Document
from nexus_ray.errors import DataError, ModelError

_USUAL_KEYS = frozenset(
    {"role", "content", "thinking", "reasoning_content", "name", "type", "id", "function", "arguments", "tool_calls"}
)
# A macro of this name takes the place of the global function that templates ask for the current date.
_PINNED_DATE = "{%- macro strftime_now(format) -%}2025-01-01{%- endmacro -%}"


def encode_document(tokenizer: PreTrainedTokenizerBase, document: Document) -> list[int]:
    """Token ids of a document. Conversations go through the model's own chat template; text that looks like a
    special token stays text."""
    if document.messages is not None:
        tools = list(document.tools) if document.tools else None
        return encode_messages(tokenizer, list(document.messages), tools=tools, pin_date=True)
    text = document.text or ""
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False))


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    prompt: bool = False,
    pin_date: bool = False,
    reasoning_effort: str | None = None,
) -> list[int]:
    """Token ids of a conversation rendered with the model's chat template.

    Args:
        tokenizer: the tokenizer that carries the template.
        messages: role and content, in order.
        tools: functions that the assistant may call, as JSON schemas.
        prompt: end with the header of the assistant's next turn.
        reasoning_effort: how much the template asks the model to think; default: the template's own.
        pin_date: let the template print a fixed date, so that training data is the same on every day.

    Raises:
        DataError: the template refuses the messages.
        ModelError: there is no template.
    """
    template = chat_template(tokenizer, pin_date=pin_date)
    _refuse_control_tokens_in_keys(tokenizer, [messages, tools])
    try:
        ids = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=template,
            add_generation_prompt=prompt,
            return_dict=False,
            **({} if reasoning_effort is None else {"reasoning_effort": reasoning_effort}),
            sanitize_control_tokens=True,  # a message must not be able to write <|end|>
        )
    except Exception as error:  # jinja raises whatever the template asks for
        raise DataError(f"the chat template refuses the messages: {error}") from error
    return list(ids)


def chat_template(tokenizer: PreTrainedTokenizerBase, *, pin_date: bool = False) -> str:
    """The template that `encode_messages` renders with.

    Raises:
        ModelError: there is none.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ModelError("the tokenizer has no chat template", "add chat_template.jinja to the model directory")
    return _PINNED_DATE + template if pin_date else template


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
