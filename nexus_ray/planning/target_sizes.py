"""Sizes of teacher targets: bytes that are stored of each source, and those of a decoded sequence in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nexus_ray.config import Config
from nexus_ray.planning.sizes import ModelSizes
from nexus_ray.planning.text import SourceText
from nexus_ray.targets.configured import output_encoding, router_encoding, sources_with
from nexus_ray.targets.encoding.encodings import HiddenEncoding, OutputEncoding, SampledEncoding
from nexus_ray.targets.encoding.routers import RouterEncoding

_ID_BYTES = 4  # of a stored token before compression; its bit of the loss mask is next to nothing
_INT64, _FLOAT32, _BFLOAT16 = 8, 4, 2


@dataclass(frozen=True)
class SourceTargets:
    """What a target set holds of one source.

    Attributes:
        tokens: of its text, as far as `targets.max_tokens` wants them.
        length: tokens of a sequence.
        output: how next-token distributions are stored; None without them.
        router: how routers are stored; None without them.
    """

    tokens: int
    length: int
    output: OutputEncoding | None
    router: RouterEncoding | None

    @property
    def teacher_tokens(self) -> int:
        """Tokens that the teacher reads."""
        return self.tokens if self.output or self.router else 0

    @property
    def needs_head(self) -> bool:
        """Whether the teacher forms logits of the vocabulary."""
        return self.output is not None and not isinstance(self.output, HiddenEncoding)

    @property
    def sequence_bytes(self) -> int:
        """Stored bytes of a full sequence before compression; targets are not compressed."""
        size = self.length * _ID_BYTES
        if self.output:
            size += (self.length - 1) * sum(self.output.widths().values())
        if self.router:
            size += self.router.positions(self.length) * sum(self.router.widths().values())
        return size

    @property
    def bytes_per_token(self) -> float:
        """Stored bytes of a token, its id and all targets."""
        return self.sequence_bytes / self.length

    @property
    def stored_bytes(self) -> int:
        """Of all tokens."""
        return int(self.tokens * self.bytes_per_token)

    @property
    def decoded_bytes(self) -> int:
        """A full sequence as training gets it: ids, masks and decoded targets (`targets/teacher.py`)."""
        size = self.length * (_INT64 + 2)
        if self.output:
            size += (self.length - 1) * _decoded_output(self.output)
        if self.router:
            size += self.router.positions(self.length) * _decoded_router(self.router)
        return size

    @property
    def form(self) -> str:
        """In words."""
        parts = [_output_form(self.output)] if self.output else []
        parts += [_router_form(self.router)] if self.router else []
        return ", ".join(parts) or "tokens only"


def source_targets(config: Config, sizes: ModelSizes, text: Mapping[str, SourceText]) -> dict[str, SourceTargets]:
    """The targets of each source of a run; of those without text here the tokens that are wanted, if that is said.

    Raises:
        ConfigError: the settings of targets do not fit the model.
    """
    with_output, with_router = sources_with(config, "needs_output"), sources_with(config, "router_kl")
    hidden, wanted = sizes.dimensions.hidden_size, config.targets.max_tokens
    output = output_encoding(config, vocabulary=sizes.vocabulary, hidden_size=hidden) if with_output else None
    router = router_encoding(config, sizes.dimensions) if with_router else None
    return {
        name: SourceTargets(
            tokens=text[name].up_to(wanted) if name in text else wanted or 0,
            length=config.data.sequence_length,
            output=output if name in with_output else None,
            router=router if name in with_router else None,
        )
        for name in config.train.sources
    }


def _decoded_output(encoding: OutputEncoding) -> int:
    """Bytes of one position."""
    if isinstance(encoding, HiddenEncoding):
        return encoding.hidden_size * (_BFLOAT16 if encoding.dtype == "bfloat16" else _FLOAT32)
    if isinstance(encoding, SampledEncoding):
        return encoding.draws * _INT64 + _FLOAT32
    return encoding.k * (_INT64 + _FLOAT32) + _FLOAT32


def _decoded_router(encoding: RouterEncoding) -> int:
    """Bytes of one position, all of its layers."""
    if encoding.mode == "logits":
        return len(encoding.layers) * encoding.experts * _FLOAT32
    return len(encoding.layers) * (encoding.experts_per_token * (_INT64 + _FLOAT32) + _FLOAT32)


def _output_form(encoding: OutputEncoding) -> str:
    if isinstance(encoding, HiddenEncoding):
        return f"hidden states in {encoding.dtype}"
    if isinstance(encoding, SampledEncoding):
        return f"{encoding.draws} draws"
    return f"top {encoding.k} in {encoding.value_bits} bits"


def _router_form(encoding: RouterEncoding) -> str:
    kind = "router logits" if encoding.mode == "logits" else "selected experts"
    layers = "1 layer" if len(encoding.layers) == 1 else f"{len(encoding.layers)} layers"
    often = "" if encoding.every == 1 else f", every {encoding.every}th position"
    return f"{kind} of {layers}{often}"
