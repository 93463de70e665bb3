"""Log-probabilities of tokens in OpenAI's two shapes: that of chats and the older one of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nexus_ray.generation.codec import Codec
from nexus_ray.generation.request import TokenChoice

_LOWEST = -9999.0  # what OpenAI's interface writes for a token without probability: JSON knows no infinity


def chat_logprobs(codec: Codec, choices: Sequence[TokenChoice], alternatives: int) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat: each token with its bytes and the most likely ones in its place."""
    return [
        _chat_token(codec, choice.id, choice.logprob)
        | {"top_logprobs": [_chat_token(codec, id_, value) for id_, value in choice.top[:alternatives]]}
        for choice in choices
    ]


def _chat_token(codec: Codec, id_: int, logprob: float | None) -> dict[str, Any]:
    raw = codec.token_bytes(id_)
    text = raw.decode(errors="replace")
    return {"token": text, "logprob": _finite(logprob), "bytes": list(raw)}


def text_logprobs(
    codec: Codec, choices: Sequence[TokenChoice], alternatives: int, start: int = 0, *, generated: bool = False
) -> dict[str, list[Any]]:
    """`logprobs` of a completion: parallel lists, a place a token.

    Args:
        codec: spells tokens.
        choices: the tokens; one without a log-probability has nothing before it.
        alternatives: most likely tokens to name; the token itself is always named.
        start: characters of text before the first token.
        generated: special tokens are no text.
    """
    tokens = [codec.token_text(choice.id) for choice in choices]
    offsets = codec.offsets([choice.id for choice in choices], generated=generated)[:-1]
    return {
        "tokens": tokens,
        "token_logprobs": [None if choice.logprob is None else _finite(choice.logprob) for choice in choices],
        "top_logprobs": [_named(codec, choice, alternatives) for choice in choices],
        "text_offset": [start + offset for offset in offsets],
    }


def _named(codec: Codec, choice: TokenChoice, alternatives: int) -> dict[str, float] | None:
    if choice.logprob is None:
        return None
    named = {codec.token_text(id_): _finite(value) for id_, value in choice.top[:alternatives]}
    return {codec.token_text(choice.id): _finite(choice.logprob)} | named


def _finite(logprob: float | None) -> float:
    return _LOWEST if logprob is None else max(logprob, _LOWEST)
