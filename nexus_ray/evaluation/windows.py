"""The windows of a long text: which tokens one forward pass reads, and which of its predictions are scored.

Every token of the text is scored exactly once, whatever the windows: sums over windows are sums over the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """One forward pass.

    Attributes:
        inputs: tokens that the model reads, at most the length of the windows.
        targets: what its predictions at the last `len(targets)` positions of `inputs` are scored against; the last
            token of `inputs` predicts the last of them.
    """

    inputs: list[int]
    targets: list[int]


def rolling_windows(ids: Sequence[int], prefix: int, length: int, stride: int | None = None) -> list[Window]:
    """The windows of a text of any length, which `window_spans` describes.

    Args:
        ids: tokens to be predicted; none give no window.
        prefix: token that the first one is predicted from.
        length: tokens that one pass reads at most, 1 or more.
        stride: tokens that a window after the first scores, 1 to `length`; default: `length`.

    Raises:
        ValueError: `length` or `stride` is out of its range.
    """
    stream = [prefix, *ids]
    spans = window_spans(len(stream) - 1, length, stride)
    return [
        Window(stream[span.start : span.stop], stream[span.stop - span.targets + 1 : span.stop + 1]) for span in spans
    ]


@dataclass(frozen=True)
class Span:
    """A window of a text with the prefix before it, as places: 0 is the prefix, 1 the text's first token.

    Attributes:
        start: place of the first token that is read.
        stop: one past the last.
        targets: how many tokens are scored; the last of them is at `stop`.
    """

    start: int
    stop: int
    targets: int


def window_spans(tokens: int, length: int, stride: int | None = None) -> Iterator[Span]:
    """The windows of a text of `tokens` tokens, none of which is held.

    The first window reads the prefix and scores up to `length` tokens, which see all of the text before them. Each
    later one reads exactly `length` tokens of the text and scores the next `stride`, so that its first target sees
    `length - stride + 1` tokens and its last one `length`. The last window has fewer targets where the text ends: it
    reads `length` tokens nevertheless, and its targets see more. Without a stride windows overlap by one token, and
    cost least; a smaller stride costs `length / stride` as much and gives a lower perplexity.

    They are lm-eval's (`get_rolling_token_windows` of lm_eval/utils.py, 0.4.13) with `max_seq_len=length` and
    `context_len=length - stride + 1`; without a stride `context_len=1`, as its `loglikelihood_rolling` calls it.

    Raises:
        ValueError: `length` or `stride` is out of its range, 1 <= stride <= length.
    """
    step = length if stride is None else stride
    if length < 1 or not 1 <= step <= length:
        raise ValueError(f"windows of {length} tokens with a stride of {step}: 1 <= stride <= length is needed")
    return _spans(tokens, length, step)


def _spans(tokens: int, length: int, step: int) -> Iterator[Span]:
    first = min(tokens, length)
    if first:
        yield Span(0, first, first)
    for done in range(length, tokens, step):
        end = min(done + step, tokens)
        yield Span(end - length, end, end - done)
