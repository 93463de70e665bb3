"""From an answer's tokens to text that can be shown at once: whole characters, nothing past a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nexus_ray.generation.harmony import LONGEST_HEADER, Channel, HarmonyParser, HarmonyTokens
from nexus_ray.generation.request import TokenChoice

Decode = Callable[[list[int]], str]
_INCOMPLETE = "\ufffd"  # what decoders put in the place of a character whose last bytes are still to come


@dataclass(frozen=True)
class Piece:
    """A part of an answer's text.

    Attributes:
        text: whole characters, at least one.
        channel: content is the answer, reasoning what the model thought before it, call the arguments of a function.
        function: on the channel "call", the function's name.
        tokens: the tokens that this text completes, those held back before among them.
    """

    text: str
    channel: Channel = "content"
    function: str = ""
    tokens: tuple[TokenChoice, ...] = ()


class IncrementalDecoder:
    """Decodes tokens one by one and holds back incomplete UTF-8 characters.

    Each piece is decoded together with the one before it, because some tokenizers treat the first token of a
    text differently.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._before: list[int] = []
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Text that `token` completes; may be empty."""
        self._pending.append(token)
        text = self._new_text()
        if text.endswith(_INCOMPLETE):
            return ""
        self._before, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """Text still held back; a character that was never completed becomes U+FFFD."""
        text = self._new_text() if self._pending else ""
        self._before, self._pending = [], []
        return text

    def _new_text(self) -> str:
        return self._decode(self._before + self._pending)[len(self._decode(self._before)) :]


class StopStrings:
    """Cuts text at the first of some strings, and holds back what may become one.

    Attributes:
        found: a stop string has been met; nothing more is let through.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """Text that is certain to stand before any stop string; may be empty."""
        if self.found:
            return ""
        text = self._held + text
        cuts = [cut for stop in self._stops if (cut := text.find(stop)) >= 0]
        self.found = bool(cuts)
        keep = min(cuts) if cuts else len(text) - self._possible_start(text)
        self._held = "" if self.found else text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """Text still held back: no stop string came of it."""
        text, self._held = self._held, ""
        return text

    def _possible_start(self, text: str) -> int:
        """Characters at the end of `text` that begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)


class TextDecoder(Protocol):
    """Turns tokens into pieces of text as they come."""

    @property
    def finished(self) -> bool:
        """The text is complete; what follows is not part of it."""
        ...

    def push(self, choice: TokenChoice) -> list[Piece]:
        """Pieces that the next generated token completes."""
        ...

    def flush(self) -> list[Piece]:
        """Pieces still held back, once no more tokens come."""
        ...


class PlainDecoder:
    """Turns the tokens of a continued text into pieces; special tokens are no text.

    Args:
        special: ids of special tokens; the first one of `ends` ends the text.
        ends: ids that end the text.
        decode: text of token ids.
        stops: strings that end the text.
    """

    def __init__(self, special: frozenset[int], ends: frozenset[int], decode: Decode, stops: Sequence[str]) -> None:
        self._special = special
        self._ends = ends
        self._decoder = IncrementalDecoder(decode)
        self._stops = StopStrings(stops)
        self._ended = False
        self._tokens: list[TokenChoice] = []

    @property
    def finished(self) -> bool:
        """An end token or a stop string was met."""
        return self._ended or self._stops.found

    def push(self, choice: TokenChoice) -> list[Piece]:
        """Pieces that the next generated token completes."""
        if self.finished:
            return []
        self._ended = choice.id in self._ends
        self._tokens.append(choice)
        if choice.id in self._special:
            return []
        return self._pieces(self._stops.push(self._decoder.push(choice.id)))

    def flush(self) -> list[Piece]:
        """Pieces still held back, once no more tokens come; tokens without text come with the last."""
        text = self._stops.push(self._decoder.flush()) + self._stops.flush()
        return self._pieces(text) if text or not self._tokens else self._pieces(text, always=True)

    def _pieces(self, text: str, *, always: bool = False) -> list[Piece]:
        if not text and not always:
            return []
        tokens, self._tokens = tuple(self._tokens), []
        return [Piece(text, tokens=tokens)]


class AnswerDecoder:
    """Turns the tokens of one answer into pieces of text.

    Args:
        tokens: ids of the harmony format's tokens.
        decode: text of token ids, special tokens excluded.
        stops: strings that end the content.
    """

    def __init__(self, tokens: HarmonyTokens, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._parser = HarmonyParser(tokens, decode)
        self._decoder = IncrementalDecoder(decode)
        self._stops = StopStrings(stops)
        self._channel: Channel = "content"
        self._special = tokens.special
        self._recent: deque[TokenChoice] = deque(maxlen=LONGEST_HEADER + 1)
        self._tokens: list[TokenChoice] = []

    @property
    def finished(self) -> bool:
        """The answer is complete."""
        return self._parser.finished or self._stops.found

    def push(self, choice: TokenChoice) -> list[Piece]:
        """Pieces that the next generated token completes."""
        if self.finished:
            return []
        if choice.id not in self._special:
            self._recent.append(choice)
        return self._read(self._parser.push(choice.id))

    def flush(self) -> list[Piece]:
        """Pieces still held back, once no more tokens come."""
        pieces = self._read(self._parser.flush())
        pieces += self._pieces(self._decoder.flush())
        rest = self._stops.flush()
        return [*pieces, *self._whole(rest, "content")] if rest else pieces

    def _read(self, released: list[tuple[Channel, int]]) -> list[Piece]:
        pieces: list[Piece] = []
        # What the parser releases is the newest token, or all of a header, which ends with the newest.
        choices = list(self._recent)[len(self._recent) - len(released) :]
        for (channel, token), choice in zip(released, choices, strict=True):
            if channel != self._channel:
                pieces += self._pieces(self._decoder.flush())
                self._channel, self._tokens = channel, []
            self._tokens.append(choice)
            pieces += self._pieces(self._decoder.push(token))
        return pieces

    def _pieces(self, text: str) -> list[Piece]:
        if self._channel == "content":
            text = self._stops.push(text)
        return self._whole(text, self._channel) if text else []

    def _whole(self, text: str, channel: Channel) -> list[Piece]:
        tokens, self._tokens = tuple(self._tokens), []
        return [Piece(text, channel, self._parser.function if channel == "call" else "", tokens)]
