"""What base and student write next, greedily and side by side: something to read beside the numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nexus_ray.config import ContinuationsSection
from nexus_ray.data.documents import read_documents
from nexus_ray.data.encoding import encode_document, encode_messages
from nexus_ray.data.packing import separator_id
from nexus_ray.data.row_forms import Document, Message
from nexus_ray.data.sources import Shard
from nexus_ray.errors import DataError
from nexus_ray.modeling.continuation import continue_ids
from nexus_ray.modeling.loading import LoadedModel

_BROKEN = "\ufffd"  # what decoding leaves of a character whose last bytes were cut off


@dataclass(frozen=True)
class Prompt:
    """What both models continue.

    Attributes:
        source: the held-out text it is from; None for one of the configuration.
        text: as people read it: the beginning of a document, or the last message of a conversation.
        ids: its tokens.
        is_chat: whether an answer is asked for; its control tokens are shown.
    """

    source: str | None
    text: str
    ids: list[int]
    is_chat: bool = False


def continue_both(student: LoadedModel, prompt: Prompt, tokens: int) -> dict[str, Any]:
    """The greedy continuations of one prompt.

    Args:
        student: base and overlay.
        prompt: what to continue.
        tokens: of each continuation at most.

    Returns:
        {source, prompt, base, student}, the continuations as text.
    """
    with student.base():
        base = _continuation(student, prompt, tokens)
    found = {"base": base, "student": _continuation(student, prompt, tokens)}
    return {"source": prompt.source, "prompt": prompt.text} | found


def _continuation(loaded: LoadedModel, prompt: Prompt, tokens: int) -> str:
    ends = {separator_id(loaded.tokenizer)}
    if prompt.is_chat and isinstance(loaded.tokenizer.eos_token_id, int):
        ends.add(loaded.tokenizer.eos_token_id)
    ids = continue_ids(loaded, prompt.ids, tokens, ends)
    return str(loaded.tokenizer.decode(ids, skip_special_tokens=not prompt.is_chat))


def own_prompts(loaded: LoadedModel, prompts: Sequence[str]) -> list[Prompt]:
    """Prompts of the configuration: beginnings of documents."""
    return [_beginning(loaded, None, text) for text in prompts]


def source_prompts(loaded: LoadedModel, shard: Shard, count: int, section: ContinuationsSection) -> list[Prompt]:
    """Beginnings of the first documents of a shard; rows that give none are passed over.

    Of a conversation everything before its last answer is taken; one that leaves the context no room for an answer is
    passed over.
    """
    documents = read_documents(shard, lambda error: None)
    found = (prompt for document in documents for prompt in _prompts_of(loaded, shard, document, section))
    return list(itertools.islice(found, count))


def _prompts_of(
    loaded: LoadedModel, shard: Shard, document: Document, section: ContinuationsSection
) -> Iterator[Prompt]:
    """At most one."""
    if document.messages is not None:
        yield from _question(loaded, shard, document, section.tokens)
        return
    ids = encode_document(loaded.tokenizer, document)[: section.prompt_tokens]
    text = str(loaded.tokenizer.decode(ids)).rstrip(_BROKEN)
    if text.strip():
        yield _beginning(loaded, shard.source, text)


def _beginning(loaded: LoadedModel, source: str | None, text: str) -> Prompt:
    ids = encode_document(loaded.tokenizer, Document(text=text))
    return Prompt(source, text, [separator_id(loaded.tokenizer), *ids])


def _question(loaded: LoadedModel, shard: Shard, document: Document, tokens: int) -> Iterator[Prompt]:
    messages = _before_last_answer(list(document.messages or ()))
    if not messages:
        return
    tools = list(document.tools) if document.tools else None
    try:
        ids = encode_messages(loaded.tokenizer, messages, tools=tools, prompt=True, pin_date=True)
    except DataError:
        return
    if len(ids) + tokens <= int(loaded.config["max_position_embeddings"]):
        yield Prompt(shard.source, str(messages[-1].get("content", "")), ids, is_chat=True)


def _before_last_answer(messages: list[Message]) -> list[Message]:
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return messages[: answers[-1]] if answers else messages
