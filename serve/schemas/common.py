"""What several requests share: text that can be tokenised, sampling parameters, fields that ask for nothing."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES = 16
MOST_ALTERNATIVES = 20
MOST_STOPS = 32  # more than OpenAI's 4: evaluation harnesses send all that a task has


def _whole_characters(text: str) -> str:
    """JSON can spell half a surrogate pair, which is no character and cannot be tokenised."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text holds an unpaired surrogate, which is not a character")
    return text


AnyText = Annotated[str, AfterValidator(_whole_characters)]
NonEmpty = Annotated[AnyText, Field(min_length=1)]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(BaseModel):
    """Sampling parameters and other fields of every request that generates text."""

    model_config = ConfigDict(extra="forbid")
    ignored: ClassVar[tuple[str, ...]] = ("user", "metadata", "store", "service_tier", "safety_identifier")
    # Values that ask for nothing: with any other, the answer would not be what the request describes.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "logit_bias": ({},),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
    }

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: AnyText | Annotated[list[NonEmpty], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, neutral in cls.neutral.items():
            if values.get(name) is not None and values[name] not in neutral:
                wanted = f"only {neutral[0]!r} is" if neutral else "it is not"
                raise ValueError(f"{name}: {wanted} supported, found {str(values[name])[:80]!r}")
        dropped = {*cls.ignored, *cls.neutral}
        return {name: value for name, value in values.items() if name not in dropped}

    @property
    def choices(self) -> int:
        """How many answers to one prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """The stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, choice: int) -> dict[str, Any]:
        """How to generate one of `n` choices; OpenAI's defaults where the request says nothing."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "stop": tuple(text for text in stop if text),
            "seed": None if self.seed is None else self.seed + choice,
        }
