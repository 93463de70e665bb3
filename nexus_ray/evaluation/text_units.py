"""Words and bytes of a text as it was before any tokenizer, and perplexities per unit of them.

Tokenizers differ in how many tokens they make of a text; its words and bytes stay the same, so that these figures
compare models of different vocabularies. They count as lm-eval's tasks of rolling log-likelihood do, e.g. wikitext
(lm_eval/tasks/wikitext/preprocess_wikitext.py, 0.4.13).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SPACE = re.compile(r"\s+")
_LONGER_UTF8 = np.asarray([0x80, 0x800, 0x10000])  # characters from which on UTF-8 takes a byte more
_LARGEST_NATS = 700.0  # per unit; past it the perplexity is no finite number


@dataclass(frozen=True)
class TextUnits:
    """How much text there is; `a + b` is that of two texts.

    Attributes:
        words: pieces between runs of whitespace; whitespace at either end of a text adds an empty piece there.
        num_bytes: length in UTF-8.
    """

    words: int
    num_bytes: int

    @classmethod
    def of(cls, text: str) -> TextUnits:
        """Those of one text. The empty one has one word, as in lm-eval, and no bytes."""
        return cls(len(_SPACE.split(text)), len(text.encode("utf-8")))

    def __add__(self, other: TextUnits) -> TextUnits:
        return TextUnits(self.words + other.words, self.num_bytes + other.num_bytes)


def unit_perplexity(total_nats: float, units: int) -> float | None:
    """exp(nats / units): per word or per byte, by what is counted.

    Returns:
        None where there are no units, or where the result is no finite number: a long text without whitespace, as in
        Chinese, is a single word.
    """
    if units < 1 or not total_nats / units < _LARGEST_NATS:
        return None
    return math.exp(total_nats / units)


def words_of_tokens(text: str, token_bytes: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """How many of a text's words are counted at each of its tokens, so that parts of a text can be counted.

    The first word is counted at the first token, every other one where the whitespace before it begins. Over all
    tokens that is `TextUnits.of(text).words`.

    Args:
        text: not empty.
        token_bytes: [tokens] UTF-8 bytes that each of its tokens stands for.

    Returns:
        [tokens] counts; None where the tokens stand for other bytes than the text has, so that the place of a word
        among them is unknown.
    """
    ends = np.cumsum(token_bytes)
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (characters[:, None] >= _LONGER_UTF8).sum(axis=1)
    starts = np.cumsum(widths) - widths
    if not len(ends) or ends[-1] != widths.sum():
        return None
    gaps = starts[[match.start() for match in _SPACE.finditer(text)]]
    counts = np.bincount(np.searchsorted(ends, gaps, side="right"), minlength=len(ends))
    counts[0] += 1
    return counts
