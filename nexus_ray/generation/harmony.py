"""Reading GPT-OSS's harmony format token by token: which tokens are text, and on which channel.

After the prompt's `<|start|>assistant` the model writes `<|channel|>analysis<|message|>...<|end|>` (maybe), then
`<|start|>assistant<|channel|>final<|message|>...<|return|>`, or calls a function: ` to=functions.NAME` before or after
the channel's name, JSON arguments as the text, and `<|call|>`. A weak model may leave any part of that out; what has no
header is content. The format: https://cookbook.openai.com/articles/openai-harmony.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

Channel = Literal["content", "reasoning", "call"]
_REASONING = ("analysis", "commentary")
_STOPS = ("<|return|>", "<|call|>", "<|endoftext|>")
LONGEST_HEADER = 32  # tokens; a header that goes on is not one
_RECIPIENT = re.compile(r"\bto=functions\.([^\s<]+)")


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
        function: name of the function that the present message calls, on the channel "call".
    """

    def __init__(self, tokens: HarmonyTokens, decode: Callable[[list[int]], str]) -> None:
        self.finished = False
        self.function = ""
        self._tokens = tokens
        self._decode = decode
        # The prompt ends with the author, so what comes first may still be the author's header.
        self._state: Literal["opening", "text", "author", "channel"] = "opening"
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
            return self.flush()
        if token == tokens.end:
            return self._end_message()
        if token == tokens.start:
            self._start_message()
        elif token == tokens.channel:
            self._name_channel()
        elif token == tokens.message:
            self._start_text()
        elif token not in tokens.special:
            return self._push_ordinary(token)
        return []

    def flush(self) -> list[tuple[Channel, int]]:
        """What was held back as the beginning of a header that never came."""
        released = self._header if self._state == "opening" else []
        self._header = []
        return [("content", id_) for id_ in released]

    def _end_message(self) -> list[tuple[Channel, int]]:
        """The end of reasoning: the answer is still to come. The end of anything else: of the answer."""
        if self._state == "text" and self._channel == "reasoning":
            self._channel = "content"
            return []
        self.finished = True
        return self.flush()

    def _start_message(self) -> None:
        if self._answered:
            self.finished = True
        self._state, self._channel, self._header, self.function = "author", "content", [], ""

    def _name_channel(self) -> None:
        self._check_author()
        self._state, self._header = "channel", []

    def _start_text(self) -> None:
        self._check_author()
        if self._state == "channel":
            header = self._decode(self._header)
            self._find_function(header)
            name = header.split()
            self._channel = "reasoning" if name and name[0] in _REASONING else "content"
        if self.function:
            self._channel, self._answered = "call", True
        self._state, self._header = "text", []

    def _check_author(self) -> None:
        """A model that goes on to write somebody else's message has finished its own."""
        if self._state in ("author", "opening"):
            author = self._decode(self._header)
            self._find_function(author)
            if self._state == "author" and not author.strip().startswith("assistant"):
                self.finished = True

    def _find_function(self, header: str) -> None:
        if found := _RECIPIENT.search(header):
            self.function = found.group(1)

    def _push_ordinary(self, token: int) -> list[tuple[Channel, int]]:
        if self._state == "text":
            self._answered |= self._channel == "content"
            return [(self._channel, token)]
        self._header.append(token)
        if self._may_be_header():
            return []
        text, self._header = self._header, []
        self._state, self._channel, self._answered = "text", "content", True
        return [(self._channel, id_) for id_ in text]

    def _may_be_header(self) -> bool:
        """What was read since the last special token can still become a header."""
        if len(self._header) > LONGEST_HEADER:
            return False
        return self._state != "opening" or _begins_recipient(self._decode(self._header))


def _begins_recipient(text: str) -> bool:
    """Text after `<|start|>assistant` can only be ` to=...`; everything else is an answer without a header."""
    stripped = text.lstrip(" ")
    return "to=functions."[: len(stripped)] == stripped[: len("to=functions.")] and "\n" not in stripped
