"""Answers to chats and continuations of texts: an engine's tokens between tokenising and text, within limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from nexus_ray.errors import DataError
from nexus_ray.generation.codec import Codec
from nexus_ray.generation.engine import Engine
from nexus_ray.generation.request import (
    ContextLengthError,
    Continuation,
    SamplingParams,
    TokenChoice,
    TokenEvent,
    TokenRequest,
    UnknownModelError,
)
from nexus_ray.generation.text import AnswerDecoder, Piece, PlainDecoder, TextDecoder

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class Prompt:
    """A request that was found to fit.

    Attributes:
        request: what the engine is asked.
        stop: strings that end the text.
        kind: chat: the answer is read as the chat format has it; text: as it is.
    """

    request: TokenRequest
    stop: tuple[str, ...]
    kind: Literal["chat", "text"]

    def seeded(self, seed: int | None) -> Prompt:
        """The same with another seed."""
        return replace(self, request=replace(self.request, seed=seed))


class Reading:
    """Turns the tokens of one continuation into text, and knows when to stop.

    Attributes:
        completion_tokens: tokens read so far, headers and end tokens included.

    Args:
        decoder: of the continuation.
    """

    def __init__(self, decoder: TextDecoder) -> None:
        self.completion_tokens = 0
        self._decoder = decoder
        self._called = False

    @property
    def finished(self) -> bool:
        """No more tokens are needed."""
        return self._decoder.finished

    def push(self, choice: TokenChoice) -> list[Piece]:
        """Pieces that the next token completes."""
        self.completion_tokens += 1
        return self._noted(self._decoder.push(choice))

    def flush(self) -> list[Piece]:
        """Pieces still held back at the end."""
        return self._noted(self._decoder.flush())

    @property
    def finish_reason(self) -> Literal["stop", "length", "tool_calls"]:
        """Why the text ended, once it has."""
        if self._decoder.finished:
            return "tool_calls" if self._called else "stop"
        return "length"

    def _noted(self, pieces: list[Piece]) -> list[Piece]:
        self._called |= any(piece.channel == "call" for piece in pieces)
        return pieces


class Generation:
    """An answer on its way, for a caller that waits. Iterate to get its pieces as they come.

    Attributes:
        prompt_tokens: tokens of the prompt.
    """

    def __init__(self, prompt: Prompt, continuation: Continuation, reading: Reading) -> None:
        self.prompt_tokens = len(prompt.request.ids)
        self._continuation = continuation
        self._reading = reading
        self._ended = False

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, headers and end tokens included."""
        return self._reading.completion_tokens

    @property
    def finish_reason(self) -> str | None:
        """stop, length or tool_calls, once the answer is complete."""
        return self._reading.finish_reason if self._ended else None

    def cancel(self) -> None:
        """Stop generating; what is there can still be taken."""
        self._continuation.cancel()

    def __iter__(self) -> Iterator[Piece]:
        for choice in self._continuation:
            yield from self._reading.push(choice)
            if self._reading.finished:
                self._continuation.cancel()
                break
        self._ended = True
        yield from self._reading.flush()


class Assistant:
    """Answers chats and continues texts.

    Args:
        engine: continues token ids.
        codec: the model's tokenizer.
        max_new_tokens: most tokens that a request may ask for.
    """

    def __init__(self, engine: Engine, codec: Codec, max_new_tokens: int = 512) -> None:
        self.engine = engine
        self.codec = codec
        self.max_new_tokens = max_new_tokens

    def chat_prompt(
        self,
        messages: Sequence[dict[str, Any]],
        model: str,
        params: SamplingParams,
        tools: Sequence[dict[str, Any]] | None = None,
        reasoning_effort: str | None = None,
    ) -> Prompt:
        """Render and tokenise a conversation and check that the answer fits.

        Raises:
            DataError: the chat template refuses the messages or the tools.
            ContextLengthError: prompt and answer are longer than the model's context.
            UnknownModelError: the model is not served.
        """
        self._require(model)
        self._check_characters(sum(len(str(message.get("content") or "")) for message in messages), "messages")
        ids = self.codec.encode_chat(messages, tools, reasoning_effort)
        # The format's own tokens end a message; the reader decides which of them ends the answer.
        return Prompt(self._request(ids, model, params, frozenset(self.codec.harmony.stops)), params.stop, "chat")

    def text_prompt(self, text: str | Sequence[int], model: str, params: SamplingParams) -> Prompt:
        """Tokenise a text, or take its token ids, and check that a continuation fits; an empty text is a new document.

        Raises:
            DataError: a token id is not in the vocabulary.
            ContextLengthError, UnknownModelError: as `chat_prompt`.
        """
        self._require(model)
        ids = self.encode_prompt(text)
        return Prompt(self._request(ids, model, params, self.text_ends), params.stop, "text")

    def given_prompt(self, text: str | Sequence[int], model: str) -> Prompt:
        """A prompt that is only to be read: it may fill the context.

        Raises:
            DataError, ContextLengthError, UnknownModelError: as `text_prompt`.
        """
        self._require(model)
        return Prompt(TokenRequest(tuple(self.encode_prompt(text)), model, 1, self.text_ends), (), "text")

    def encode_prompt(self, text: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt given as text or as token ids; at least one.

        Raises:
            DataError: a token id is not in the vocabulary.
            ContextLengthError: the text is far longer than the context.
        """
        if isinstance(text, str):
            self._check_characters(len(text), "prompt")
            return self.codec.encode(text) or [self.codec.separator]
        wrong = next((id_ for id_ in text if not 0 <= id_ < self.codec.vocabulary), None)
        if wrong is not None:
            raise DataError(f"token id {wrong} is not in the vocabulary of {self.codec.vocabulary} tokens")
        return list(text) or [self.codec.separator]

    @property
    def text_ends(self) -> frozenset[int]:
        """Ids that end a continued text: the model's own ends and the separator between documents."""
        return self.codec.end_ids | {self.codec.separator}

    def start(self, prompt: Prompt, emit: Callable[[TokenEvent], None] | None = None) -> Continuation:
        """Queue a prompt; what comes is for `reading(prompt)`.

        Raises:
            BusyError: the queue is full.
            ClosedError: the engine is shutting down.
        """
        return self.engine.submit(prompt.request, emit)

    def reading(self, prompt: Prompt) -> Reading:
        """What turns the tokens of a prompt's continuation into text."""
        codec = self.codec
        if prompt.kind == "chat":
            return Reading(AnswerDecoder(codec.harmony, codec.decode, prompt.stop))
        return Reading(PlainDecoder(codec.harmony.special, prompt.request.end_ids, codec.decode, prompt.stop))

    def submit(self, prompt: Prompt) -> Generation:
        """Queue a prompt and iterate over the answer; see `start`."""
        return Generation(prompt, self.start(prompt), self.reading(prompt))

    def generate(self, messages: Sequence[dict[str, Any]], model: str, params: SamplingParams) -> Generation:
        """`chat_prompt` and `submit` in one."""
        return self.submit(self.chat_prompt(messages, model, params))

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    def _require(self, model: str) -> None:
        known = self.engine.models
        if model not in known:
            raise UnknownModelError.of(model, known)

    def _request(self, ids: list[int], model: str, params: SamplingParams, ends: frozenset[int]) -> TokenRequest:
        context = self.engine.context_length
        left = context - len(ids)
        default = min(DEFAULT_MAX_TOKENS, self.max_new_tokens, max(left, 1))
        max_tokens = default if params.max_tokens is None else params.max_tokens
        if max_tokens > left:
            raise ContextLengthError(
                f"the model's context is {context} tokens, but the prompt takes {len(ids)} "
                f"and the answer may take {max_tokens}",
                "shorten the prompt or lower max_tokens",
            )
        return TokenRequest(
            tuple(ids), model, max_tokens, ends, params.temperature, params.top_p, params.seed, params.alternatives
        )

    def _check_characters(self, characters: int, what: str) -> None:
        """Refuse at once what cannot fit even in the longest tokens: tokenising megabytes holds everybody up."""
        context = self.engine.context_length
        if characters > context * self.codec.longest_token:
            raise ContextLengthError(
                f"the {what} have {characters} characters, far more than the model's context of {context} tokens holds",
                f"shorten the {what}",
            )
