"""Choosing the next token of each request, as transformers' continuous batching calls it.

Temperature, top_p, seed and log-probabilities are each request's own. A sampled token is drawn by inverting the
cumulative distribution at one uniform number of the request's own generator, so that a seed gives the same draws
whatever else is in the batch. Log-probabilities are the model's, before temperature and top_p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor

from nexus_ray.errors import ArtefactError
from nexus_ray.generation.request import TokenChoice, TokenRequest

COLDEST = 1e-4  # below this temperature the most likely token is taken: dividing by it would overflow


class Draw:
    """How one request chooses its tokens.

    Args:
        request: its temperature, top_p, seed and number of alternatives.
    """

    def __init__(self, request: TokenRequest) -> None:
        self.request = request
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed % 2**64)

    @property
    def greedy(self) -> bool:
        """No chance is involved."""
        return self.request.temperature < COLDEST

    def choose(self, logits: Tensor) -> int:
        """The next token from [vocabulary] float32 logits."""
        if self.greedy:
            return int(logits.argmax())
        probabilities = (logits / self.request.temperature).softmax(dim=-1, dtype=torch.float64)
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64).to(logits.device)
        if self.request.top_p >= 1:
            return _invert(probabilities, uniform)
        ordered, tokens = probabilities.sort(descending=True)
        return int(tokens[_invert(ordered[: _nucleus(ordered, self.request.top_p)], uniform)])


def _nucleus(ordered: Tensor, top_p: float) -> int:
    """Size of the smallest set of the most likely tokens that has probability `top_p`; at least one."""
    before = ordered.cumsum(dim=-1) - ordered
    return max(1, int((before < top_p).sum()))


def _invert(probabilities: Tensor, uniform: Tensor) -> int:
    """First place at which the cumulative share of [n] weights exceeds a number in [0, 1)."""
    cumulative = probabilities.cumsum(dim=-1)
    place = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    return min(int(place), len(probabilities) - 1)


def describe(logits: Tensor, token: int, alternatives: int | None) -> TokenChoice:
    """A token with its log-probability, in nats, and the most likely alternatives; without them if None.

    Args:
        logits: [vocabulary] float32.
        token: the chosen one.
        alternatives: how many to name.
    """
    if alternatives is None:
        return TokenChoice(token)
    log_probs = logits.log_softmax(dim=-1)
    best = log_probs.topk(min(alternatives, len(log_probs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenChoice(token, float(log_probs[token]), top)


class RowSampler(ContinuousBatchingLogitsProcessor):
    """Chooses a token for each row of logits and hands it out; transformers then takes the choice as the maximum.

    Args:
        draw_of: the draw of a request by its id, None when nobody waits for it any more.
        emit: takes the id of a request and its token, or the exception that ends it.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, draw_of: Callable[[str], Draw | None], emit: Callable[[str, TokenChoice | Exception], None]
    ) -> None:
        self._draw_of = draw_of
        self._emit = emit
        self._rows: list[str] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """There is no argument to store."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        """Remember whose rows come next; called before each forward pass."""
        self._rows = [request.state.request_id for request in requests_with_new_token]
        return torch.zeros(len(self._rows), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """[rows, vocabulary] float32 logits to scores whose maximum is the chosen token."""
        chosen = torch.zeros(scores.shape[0], dtype=torch.long)
        for row, request_id in enumerate(self._rows):
            draw = self._draw_of(request_id)
            if draw is None:
                continue
            if not torch.isfinite(scores[row].max()):
                self._emit(request_id, ArtefactError("the model's logits are not finite numbers"))
                continue
            token = draw.choose(scores[row])
            chosen[row] = token
            self._emit(request_id, describe(scores[row], token, draw.request.alternatives))
        rows = torch.arange(scores.shape[0], device=scores.device)
        scores[rows, chosen.to(scores.device)] = float("inf")
        return scores
