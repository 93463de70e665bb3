"""Texts that a student continues while it is trained, for people to read."""

from __future__ import annotations

from nexus_ray.data.packing import separator_id
from nexus_ray.modeling.continuation import continue_ids
from nexus_ray.modeling.loading import LoadedModel


def continue_text(student: LoadedModel, prompt: str, tokens: int) -> dict[str, str]:
    """The most likely continuation of a document that begins with `prompt`.

    Args:
        student: as it is now; random states stay as they are.
        prompt: plain text.
        tokens: of the continuation at most.

    Returns:
        `prompt`, and the continuation as `text`.
    """
    tokenizer = student.tokenizer
    separator = separator_id(tokenizer)
    ids = [separator, *tokenizer.encode(prompt, add_special_tokens=False, split_special_tokens=True)]
    continuation = continue_ids(student, ids, tokens, [separator])
    return {"prompt": prompt, "text": str(tokenizer.decode(continuation, skip_special_tokens=True))}
