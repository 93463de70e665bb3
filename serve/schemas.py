"""Requests and answers of the HTTP interface, in OpenAI's shapes.

Fields that only steer OpenAI's own platform are accepted and ignored. Fields that would change the answer and are
not supported are refused, and so are unknown ones: a misspelt `max_token` must not be ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from nexus_ray.generation.request import SamplingParams

_IGNORED = (
    *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prediction", "reasoning_effort"),
    *("prompt_cache_key", "prompt_cache_retention", "safety_identifier", "verbosity", "tool_choice", "function_call"),
)
# Values that ask for nothing: with any other, the answer would not be what the request describes.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
_MOST_TEXTS = 64
_MOST_CHARACTERS = 1_000_000


def _whole_characters(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no character and cannot be tokenised."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text holds an unpaired surrogate, which is not a character")
    return text


AnyText = Annotated[str, AfterValidator(_whole_characters)]
NonEmpty = Annotated[AnyText, Field(min_length=1)]


class ChatMessage(BaseModel):
    """One message of a conversation. Fields beside role and content are ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: AnyText

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: Any) -> Any:
        """Content may be a list of text parts."""
        if not isinstance(content, list):
            return content
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError("only parts of type 'text' are supported")
        return "".join(part["text"] for part in content)


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, neutral in _NEUTRAL.items():
            if values.get(name) is not None and values[name] not in neutral:
                wanted = f"only {neutral[0]!r} is" if neutral else "it is not"
                raise ValueError(f"{name}: {wanted} supported, found {str(values[name])[:80]!r}")
        dropped = {*_IGNORED, *_NEUTRAL}
        return {name: value for name, value in values.items() if name not in dropped}

    @model_validator(mode="after")
    def _system_message_is_first(self) -> Self:
        if any(message.role in ("system", "developer") for message in self.messages[1:]):
            raise ValueError("messages: only the first message may have role 'system' or 'developer'")
        return self

    @property
    def asked_tokens(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def sampling(self) -> SamplingParams:
        """How to generate; OpenAI's defaults where the request says nothing."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_tokens=self.asked_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=stop,
            seed=self.seed,
        )


class PerplexityRequest(BaseModel):
    """Body of POST /v1/perplexity: one text or several, and a model; without a model both answer side by side."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    text: NonEmpty | None = None
    texts: Annotated[list[NonEmpty], Field(min_length=1, max_length=_MOST_TEXTS)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.text is None) == (self.texts is None):
            raise ValueError("give either text or texts")
        if sum(map(len, self.all_texts)) > _MOST_CHARACTERS:
            raise ValueError(f"texts: more than {_MOST_CHARACTERS} characters in one request")
        return self

    @property
    def all_texts(self) -> list[str]:
        """The texts, in order."""
        return [self.text] if self.text is not None else list(self.texts or ())


class ModelCard(BaseModel):
    """One entry of GET /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nexus-ray"


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Usage(BaseModel):
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: str | None = None
    refusal: None = None


class Choice(BaseModel):
    """The one choice of a completion."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """Answer of POST /v1/chat/completions without `stream`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Body of every answer that is not 2xx."""

    error: ErrorDetail
