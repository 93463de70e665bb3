"""Body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import ConfigDict, Field, model_validator

from nexus_ray.generation.request import SamplingParams
from serve.schemas.common import MOST_ALTERNATIVES, AnyText, GenerationRequest

TokenIds = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
MOST_PROMPTS = 256


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions: text or token ids to continue, one prompt or several."""

    model_config = ConfigDict(extra="forbid")
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {**GenerationRequest.neutral, "suffix": ("",)}

    prompt: (
        AnyText
        | TokenIds
        | Annotated[list[AnyText], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
        | None
    ) = None
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    best_of: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("best_of: only the value of n is supported")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 needs echo to be true")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, in order; without any, one empty document."""
        match self.prompt:
            case None:
                return [""]
            case str():
                return [self.prompt]
            case [int(), *_]:
                return [[id_ for id_ in self.prompt if isinstance(id_, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    @property
    def new_tokens(self) -> int:
        """Tokens to generate at most; OpenAI's default where the request says nothing."""
        return 16 if self.max_tokens is None else self.max_tokens

    def params(self, choice: int) -> SamplingParams:
        """How to generate one of `n` choices."""
        return SamplingParams(max(self.new_tokens, 1), alternatives=self.logprobs, **self.sampling(choice))
