"""Words and bytes of a text as it was before any tokenizer, and perplexities per unit of them.

Tokenizers differ in how many tokens they make of a text; its words and bytes stay the same, so that these figures
compare models of different vocabularies. They count as lm-eval's tasks of rolling log-likelihood do, e.g. wikitext
(lm_eval/tasks/wikitext/preprocess_wikitext.py, 0.4.13).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_SPACE = re.compile(r"\s+")
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
