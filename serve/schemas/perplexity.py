"""Body of POST /v1/perplexity."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.schemas.common import NonEmpty

_MOST_TEXTS = 64
_MOST_CHARACTERS = 1_000_000


class PerplexityRequest(BaseModel):
    """One text or several, under one model, some, or (without either field) all of them side by side."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    models: Annotated[list[str], Field(min_length=1, max_length=64)] | None = None
    text: NonEmpty | None = None
    texts: Annotated[list[NonEmpty], Field(min_length=1, max_length=_MOST_TEXTS)] | None = None
    sequence_length: int | None = Field(None, ge=1, description="tokens of a window; default: the run's")
    stride: int | None = Field(None, ge=1, description="tokens that a later window scores; default: all of them")
    token_logprobs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.text is None) == (self.texts is None):
            raise ValueError("give either text or texts")
        if self.model is not None and self.models is not None:
            raise ValueError("give either model or models")
        if sum(map(len, self.all_texts)) > _MOST_CHARACTERS:
            raise ValueError(f"texts: more than {_MOST_CHARACTERS} characters in one request")
        return self

    @property
    def all_texts(self) -> list[str]:
        """The texts, in order."""
        return [self.text] if self.text is not None else list(self.texts or ())

    @property
    def all_models(self) -> list[str] | None:
        """The models once each, in order; None for all."""
        return (
            [self.model] if self.model is not None else None if self.models is None else [*dict.fromkeys(self.models)]
        )
