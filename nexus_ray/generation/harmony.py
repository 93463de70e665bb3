"""Reading GPT-OSS's harmony format token by token: which tokens are text, and on which channel.

After the prompt's `<|start|>assistant` the model writes `<|channel|>analysis<|message|>...<|end|>` (maybe), then
`<|start|>assistant<|channel|>final<|message|>...<|return|>`. A weak model may leave any part of that out; what
has no header is content. The format: https://cookbook.openai.com/articles/openai-harmony.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

Channel = Literal["content", "reasoning"]
_REASONING = ("analysis", "commentary")
_STOPS = ("<|return|>", "<|call|>", "<|endoftext|>")
_LONGEST_HEADER = 16  # tokens; a header that goes on is not one


@dataclass(frozen=True)
class HarmonyTokens:
    """Ids of the format's tokens; None where the vocabulary lacks one.

    Attributes:
        start: begins a message; its author follows.
        channel: the channel's name follows.
        message: ends the header; the text follows.
        end: ends a message.
        stops: any of these ends the answer.
        special: every special token; none of them is text.
    """

    start: int | None
    channel: int | None
    message: int | None
    end: int | None
    stops: frozenset[int]
    special: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, end_ids: Iterable[int] = ()) -> HarmonyTokens:
        """Look the tokens up in a vocabulary; `end_ids` are further ends, such as the model's own."""
        ids = tokenizer.get_added_vocab()
        special = frozenset(tokenizer.all_special_ids) | {
            id_ for token, id_ in ids.items() if token.startswith("<|") and token.endswith("|>")
        }
        start, channel, message, end = (ids.get(f"<|{name}|>") for name in ("start", "channel", "message", "end"))
        stops = frozenset(ids[name] for name in _STOPS if name in ids) | frozenset(end_ids)
        return cls(start, channel, message, end, stops, special | stops)


class HarmonyParser:
    """Sorts an answer's tokens into channels as they are generated.

    Args:
        tokens: ids of the format's tokens.
        decode: text of header tokens.

    Attributes:
        finished: the answer is complete; what follows is not part of it.
    """

    def __init__(self, tokens: HarmonyTokens, decode: Callable[[list[int]], str]) -> None:
        self.finished = False
        self._tokens = tokens
        self._decode = decode
        self._state: Literal["text", "author", "channel"] = "text"
        self._channel: Channel = "content"
        self._header: list[int] = []
        self._answered = False

    def push(self, token: int) -> list[tuple[Channel, int]]:
        """Take the next token; return the text tokens it releases with their channels.

        That is the token itself within a message, nothing within a header, and a whole header when it turns out
        not to be one.
        """
        tokens = self._tokens
        if self.finished:
            return []
        if token in tokens.stops:
            self.finished = True
        elif token == tokens.end:
            self._end_message()
        elif token == tokens.start:
            self._start_message()
        elif token == tokens.channel:
            self._name_channel()
        elif token == tokens.message:
            self._start_text()
        elif token not in tokens.special:
            return self._push_ordinary(token)
        return []

    def _end_message(self) -> None:
        """The end of reasoning: the answer is still to come. The end of anything else: of the answer."""
        if self._state == "text" and self._channel == "reasoning":
            self._channel = "content"
        else:
            self.finished = True

    def _start_message(self) -> None:
        if self._answered:
            self.finished = True
        self._state, self._channel, self._header = "author", "content", []

    def _name_channel(self) -> None:
        self._check_author()
        self._state, self._header = "channel", []

    def _start_text(self) -> None:
        self._check_author()
        if self._state == "channel":
            name = self._decode(self._header).split()
            self._channel = "reasoning" if name and name[0] in _REASONING else "content"
        self._state, self._header = "text", []

    def _check_author(self) -> None:
        """A model that goes on to write somebody else's message has finished its own."""
        if self._state == "author" and not self._decode(self._header).strip().startswith("assistant"):
            self.finished = True

    def _push_ordinary(self, token: int) -> list[tuple[Channel, int]]:
        if self._state == "text":
            self._answered |= self._channel == "content"
            return [(self._channel, token)]
        self._header.append(token)
        if len(self._header) <= _LONGEST_HEADER:
            return []
        text, self._header = self._header, []
        self._state, self._channel, self._answered = "text", "content", True
        return [(self._channel, id_) for id_ in text]
