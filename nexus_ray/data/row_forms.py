"""The forms a row of text or chat data may have, and what each of them means as a document.

A conversation in any of them becomes the same list of messages, which goes through the model's own chat template, so
that training on a conversation and chatting with the model use the same tokens. `docs/data.md` lists the forms.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from nexus_ray.errors import DataError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_NAMES = {"human": "user", "gpt": "assistant"}  # what ShareGPT calls them
_CONVERSATIONS = ("messages", "conversations", "conversation")
# Question and answer; the first pair that a row has is taken, so Alpaca's stand before the bare input and output.
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
)
_ADDITIONS = ("input", "context")  # to an instruction
_SYSTEM = ("system", "system_prompt")
_REASONING = ("thinking", "reasoning_content", "reasoning")
_DEEPEST = 100  # levels of fields and lists in a conversation: far more than any has, far fewer than recursion allows
_ACCEPTED = (
    f"accepted: 'text' or data.sources.NAME.text_field, {', '.join(map(repr, _CONVERSATIONS))}, "
    f"{', '.join(f'{question!r} with {answer!r}' for question, answer in _PAIRS)}"
)


@dataclass(frozen=True)
class Document:
    """One text, or one conversation for the chat template.

    Attributes:
        text: plain text; None for a conversation.
        messages: role, content and what else the template knows, in order; None for plain text.
        tools: the functions that the conversation's assistant may call, as JSON schemas.
        place: file and position that it was read from, for messages to people.
    """

    text: str | None = None
    messages: tuple[Message, ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    place: str = field(default="", compare=False)


def document_of(row: Any, text_field: str | None = None, place: str = "") -> Document:
    """The document that a row holds, whichever form it has.

    Args:
        row: a JSON value or a row of a table; fields that are null count as missing.
        text_field: field that holds the text; where a row has it, it goes before every other form.
        place: passed on to the document.

    Raises:
        DataError: the row fits no form, has an unknown role, is nested too deeply for a conversation, or holds what
            cannot be written as UTF-8.
    """
    if not isinstance(row, dict):
        raise DataError(f"the row is a {type(row).__name__}, not an object with fields", _ACCEPTED)
    row = {name: value for name, value in row.items() if value is not None}
    if text_field is not None and isinstance(row.get(text_field), str):
        return _plain(row[text_field], place)
    messages = _messages(row)
    if messages is not None:
        return _conversation(messages, row, place)
    if isinstance(row.get("text"), str):
        return _plain(row["text"], place)
    wanted = f"{text_field!r}, which data.sources.NAME.text_field names, nor " if text_field else ""
    found = ", ".join(sorted(map(str, row))) or "none"
    raise DataError(f"the row has neither {wanted}'text' nor a conversation; its fields: {found}", _ACCEPTED)


def _plain(text: str, place: str) -> Document:
    _require_unicode(text)
    return Document(text=text, place=place)


def _conversation(messages: list[Message], row: dict[str, Any], place: str) -> Document:
    if not messages:
        raise DataError("the conversation has no messages")
    system = next((row[name] for name in _SYSTEM if isinstance(row.get(name), str) and row[name]), None)
    if system is not None and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    tools = _tools(row.get("tools"))
    _require_shallow([messages, tools])
    _require_unicode(json.dumps([messages, tools], ensure_ascii=False, default=str))
    return Document(messages=tuple(messages), tools=tools, place=place)


def _messages(row: dict[str, Any]) -> list[Message] | None:
    """The messages of a conversation; None when the row has no field for one."""
    for name in _CONVERSATIONS:
        if isinstance(row.get(name), list):
            return _normalised(row[name], name)
    for question, answer in _PAIRS:
        if isinstance(row.get(question), str | list) and isinstance(row.get(answer), str | list):
            asked = _with_addition(row) if question == "instruction" else row[question]
            return _turns(asked, "user", question) + _turns(row[answer], "assistant", answer)
    return None


def _with_addition(row: dict[str, Any]) -> Any:
    """An instruction and, a blank line below, the text that it is about."""
    addition = next((row[name] for name in _ADDITIONS if isinstance(row.get(name), str) and row[name]), None)
    instruction = row["instruction"]
    return f"{instruction}\n\n{addition}" if addition and isinstance(instruction, str) else instruction


def _turns(value: str | list[Any], role: str, name: str) -> list[Message]:
    """One side of a pair: a string is one message of `role`, a list holds messages already."""
    return [{"role": role, "content": value}] if isinstance(value, str) else _normalised(value, name)


def _normalised(items: list[Any], name: str) -> list[Message]:
    messages = []
    for number, item in enumerate(items):
        try:
            messages.append(_message(item))
        except DataError as error:
            raise DataError(f"{name}[{number}]: {error.message}", error.hint) from error
    return messages


def _message(item: Any) -> Message:
    """A message with the field names that chat templates know; what else it has is kept."""
    _require_shallow(item)
    if not isinstance(item, dict):
        raise DataError(f"a message must be an object with role and content, not a {type(item).__name__}")
    message: Message = _without_nulls(item)
    role = message.pop("from", None) if "role" not in message else message["role"]
    content = message.pop("value", None) if "content" not in message else message["content"]
    message["role"] = _role(role)
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    message |= _reasoning(message)
    if content is not None:
        message["content"] = _content(content, message["role"])
    elif "tool_calls" not in message:
        raise DataError(f"the message has no content; its fields: {', '.join(sorted(map(str, item)))}")
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    return message


def _role(role: Any) -> str:
    name = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if name not in ROLES:
        raise DataError(f"unknown role {role!r}", f"known roles: {', '.join((*ROLES, *_OTHER_NAMES))}")
    return str(name)


def _reasoning(message: Message) -> Message:
    """Reasoning under each name that templates look for: GPT-OSS says thinking, other families reasoning_content."""
    text = next((message[name] for name in _REASONING if isinstance(message.get(name), str)), None)
    return {} if text is None else {"thinking": text, "reasoning_content": text}


def _content(content: Any, role: str) -> Any:
    """Text, or the text of a list of parts; a tool may answer with any JSON value."""
    if isinstance(content, str) or role == "tool":
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise DataError("the content of a message must be text or a list of text parts")


def _tool_call(call: Any) -> Any:
    """A call whose arguments are an object: OpenAI's form holds them as a string of JSON, which templates quote."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _tool_call(call["function"])}
    if isinstance(call.get("arguments"), str):
        try:
            return {**call, "arguments": json.loads(call["arguments"])}
        except (ValueError, RecursionError):
            return call
    return call


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """Functions as a list, or as JSON text of one."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"'tools' is not JSON: {error}") from error
    if not value:
        return None
    _require_shallow(value)
    if not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        raise DataError("'tools' must be a list of functions")
    return tuple(_without_nulls(value))


def _without_nulls(value: Any) -> Any:
    """Without fields that are null: a table has every field of any of its rows in each of them."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value


def _require_shallow(value: Any) -> None:
    """Whoever handles a conversation goes through it by recursion, chat templates too: a hostile row exhausts that."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise DataError(f"the row has more than {_DEEPEST} levels of fields and lists", "flatten it or take it out")


def _inside(value: Any) -> Collection[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _require_unicode(text: str) -> None:
    """JSON can escape half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the text cannot be written as UTF-8: {error}", "repair it or take it out") from error
