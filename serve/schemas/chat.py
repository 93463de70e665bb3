"""Body of POST /v1/chat/completions, and its conversation in the form that chat templates take."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nexus_ray.generation.request import SamplingParams
from serve.schemas.common import MOST_ALTERNATIVES, AnyText, GenerationRequest

_FUNCTION_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


class FunctionCall(BaseModel):
    """A function with arguments, as the model called it."""

    name: Annotated[str, Field(pattern=_FUNCTION_NAME)]
    arguments: AnyText

    @field_validator("arguments")
    @classmethod
    def _are_json(cls, arguments: str) -> str:
        try:
            value = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the arguments of a call are a JSON object as a string: {error}") from error
        if not isinstance(value, dict):
            raise ValueError("the arguments of a call are a JSON object as a string")  # noqa: TRY004 (pydantic's rule)
        return arguments or "{}"


class ToolCall(BaseModel):
    """One call of an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    """One message of a conversation. Fields beside these are ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: AnyText | None = None
    reasoning_content: AnyText | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, content: Any) -> Any:
        """Content may be a list of text parts."""
        if not isinstance(content, list):
            return content
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError("only parts of type 'text' are supported")
        return "".join(part["text"] for part in content)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to messages of role 'assistant'")
        if self.content is None and not self.tool_calls:
            raise ValueError("content is required")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of role 'tool' needs tool_call_id")
        return self


class FunctionDefinition(BaseModel):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=_FUNCTION_NAME)]
    description: AnyText = ""
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A function as OpenAI wraps it."""

    type: Literal["function"]
    function: FunctionDefinition

    def as_template(self) -> dict[str, Any]:
        """The form that chat templates take."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": function}


class ChatRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="forbid")
    ignored: ClassVar[tuple[str, ...]] = (
        *GenerationRequest.ignored,
        *("parallel_tool_calls", "prediction", "verbosity", "function_call"),
        *("prompt_cache_key", "prompt_cache_retention"),
    )
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationRequest.neutral,
        "functions": ([],),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    reasoning_effort: Literal["minimal", "low", "medium", "high"] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if any(message.role in ("system", "developer") for message in self.messages[1:]):
            raise ValueError("messages: only the first message may have role 'system' or 'developer'")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        return self

    @property
    def asked_tokens(self) -> tuple[str, int | None]:
        """(field, value) of `max_completion_tokens`, or its older name."""
        if self.max_completion_tokens is None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens

    def params(self, choice: int) -> SamplingParams:
        """How to generate one of `n` choices."""
        alternatives = (self.top_logprobs or 0) if self.logprobs else None
        return SamplingParams(self.asked_tokens[1], alternatives=alternatives, **self.sampling(choice))

    def conversation(self) -> list[dict[str, Any]]:
        """Messages for the chat template, which takes one call a message: several are spread, each with its answer."""
        calls = Counter(call.id for message in self.messages for call in message.tool_calls or ())
        results = {message.tool_call_id: message for message in self.messages if message.role == "tool"}
        messages: list[dict[str, Any]] = []
        for message in self.messages:
            if message.role == "tool":
                if calls[message.tool_call_id or ""] != 1:
                    raise ValueError(f"messages: no call, or several, have the id {message.tool_call_id!r}")
                continue
            messages.append(_plain(message))
            for number, call in enumerate(message.tool_calls or ()):
                if number:
                    messages.append({"role": "assistant"})
                messages[-1]["tool_calls"] = [_call(call)]
                if call.id in results:
                    messages.append({"role": "tool", "content": results[call.id].content or ""})
        return messages

    def functions(self) -> list[dict[str, Any]] | None:
        """Functions for the chat template."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.as_template() for tool in self.tools]


def _plain(message: ChatMessage) -> dict[str, Any]:
    rendered: dict[str, Any] = {"role": message.role}
    if message.content is not None and not (message.tool_calls and message.reasoning_content):
        rendered["content"] = message.content
    if message.reasoning_content is not None and message.role == "assistant":
        rendered["thinking"] = message.reasoning_content
    return rendered


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.loads(call.function.arguments)
    return {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
