"""The windows of a long text: which tokens one forward pass reads, and which of its predictions are scored.

Every token of the text is scored exactly once, whatever the windows: sums over windows are sums over the text.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """The windows of a text of any length.

    The first window reads `prefix` and scores up to `length` tokens, which see all of the text before them. Each later
    one reads exactly `length` tokens of the text and scores the next `stride`, so its first target sees
    `length - stride + 1` tokens and its last one `length`. The last window has fewer targets where the text ends: it
    reads `length` tokens nevertheless, so that they see more. Without a stride the windows overlap by one token, and
    the costs are the lowest; a smaller stride costs `length / stride` as much and gives a lower perplexity.

    They are lm-eval's (`get_rolling_token_windows` of lm_eval/utils.py, 0.4.13) with `max_seq_len=length` and
    `context_len=length - stride + 1`; without a stride `context_len=1`, as its `loglikelihood_rolling` calls it.

    Args:
        ids: tokens to be predicted; none give no window.
        prefix: token that the first one is predicted from.
        length: tokens that one pass reads at most, 1 or more.
        stride: tokens that a window after the first scores, 1 to `length`; default: `length`.

    Raises:
        ValueError: `length` or `stride` is out of its range.
    """
    step = length if stride is None else stride
    if length < 1 or not 1 <= step <= length:
        raise ValueError(f"windows of {length} tokens with a stride of {step}: 1 <= stride <= length is needed")
    tokens = list(ids)
    first = tokens[:length]
    windows = [Window([prefix, *first[:-1]], first)] if first else []
    for done in range(length, len(tokens), step):
        end = min(done + step, len(tokens))
        windows.append(Window(tokens[end - 1 - length : end - 1], tokens[done:end]))
    return windows
