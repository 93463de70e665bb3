"""Attention over transformers' paged cache, without computing what the mask would throw away.

transformers' own eager version multiplies all queries of a batch with all keys of all requests and masks the rest; with
32 requests that is 32 times the work. Here requests that decode one token are one padded batch, and each request that
prefills is computed alone. Legend: R requests, H heads, K key-value heads, Q and T query and key tokens, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from nexus_ray.modeling.placement import moved

NAME = "nexus_paged"


@dataclass(frozen=True)
class Prefill:
    """One request that processes several tokens.

    Attributes:
        queries: its queries among all of the batch.
        keys: its keys among all of the batch.
        hidden: [Q, T] true where a query must not see a key.
    """

    queries: slice
    keys: slice
    hidden: Tensor


@dataclass(frozen=True)
class Plan:
    """Which queries of a batch attend to which keys, for the layers of one kind.

    Attributes:
        queries: [R] the queries of requests that decode one token.
        keys: [R, T] their keys among all of the batch, padded.
        padding: [R, T] true where padded.
        prefills: the other requests.
    """

    queries: Tensor
    keys: Tensor
    padding: Tensor
    prefills: tuple[Prefill, ...]

    @classmethod
    def of(cls, query_ends: Sequence[int], key_ends: Sequence[int], window: int | None, device: torch.device) -> Plan:
        """Plan a batch.

        Args:
            query_ends: cumulative numbers of query tokens, from 0.
            key_ends: the same of key tokens; a request's queries are its last keys.
            window: tokens that a token sees, itself included; None: all.
            device: where the attention is computed.
        """
        decoding, prefills = [], []
        for request in range(len(query_ends) - 1):
            queries = slice(query_ends[request], query_ends[request + 1])
            keys = slice(key_ends[request], key_ends[request + 1])
            if queries.stop - queries.start == 1:
                decoding.append((queries.start, keys.start, keys.stop))
            elif queries.stop > queries.start:
                prefills.append(Prefill(queries, keys, _hidden(queries, keys, window, device)))
        starts = torch.tensor([start for _, start, _ in decoding], dtype=torch.long, device=device)
        lengths = torch.tensor([stop - start for _, start, stop in decoding], dtype=torch.long, device=device)
        longest = max((stop - start for _, start, stop in decoding), default=0)
        places = torch.arange(longest, device=device)
        padding = places >= lengths[:, None]
        keys_of = torch.where(padding, 0, starts[:, None] + places)
        return cls(
            torch.tensor([query for query, _, _ in decoding], dtype=torch.long, device=device),
            keys_of,
            padding,
            tuple(prefills),
        )


def _hidden(queries: slice, keys: slice, window: int | None, device: torch.device) -> Tensor:
    count, length = queries.stop - queries.start, keys.stop - keys.start
    # A query's own place among the request's keys: queries are the last of them.
    own = torch.arange(length - count, length, device=device)[:, None]
    places = torch.arange(length, device=device)
    hidden = places > own
    return hidden if window is None else hidden | (places <= own - window)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: over the paged cache within `batching`, else the model's own eager attention.

    Args:
        module: an attention layer.
        query: [1, H, Q, D] of all requests of a batch.
        key: [1, K, Q, D] of the same tokens.
        value: like `key`.
        attention_mask: for eager attention only.
        kwargs: `cache`, `plans` {kind of layer: Plan} and what the cache needs; `scaling`, `dropout` and others.

    Returns:
        [1, Q, H, D], and no weights.
    """
    cache, plans = kwargs.pop("cache", None), kwargs.pop("plans", None)
    if cache is None:
        eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        return cast(tuple[Tensor, Tensor | None], eager(module, query, key, value, attention_mask, **kwargs))
    scaling, layer_device, sinks = kwargs["scaling"], query.device, getattr(module, "sinks", None)
    # The cache is on one device. New queries, keys and values go there, and come back mixed: a few kilobytes a token,
    # where the cached ones of a layer would be megabytes a request.
    query, key, value, sinks, kwargs = moved((query, key, value, sinks, kwargs), torch.device(cache.device))
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    plan: Plan = plans[cache.layer_to_allocator[module.layer_idx].layer_type]
    output = torch.empty_like(query[0].transpose(0, 1), memory_format=torch.contiguous_format)  # [Q, H, D]
    if len(plan.queries):
        output[plan.queries] = _decode(query[0], key[0], value[0], plan, sinks, scaling)
    for prefill in plan.prefills:
        parts = query[0, :, prefill.queries], key[0, :, prefill.keys], value[0, :, prefill.keys]
        output[prefill.queries] = _prefill(*parts, prefill.hidden, sinks, scaling)
    return output[None].to(layer_device), None


def _decode(query: Tensor, key: Tensor, value: Tensor, plan: Plan, sinks: Tensor | None, scaling: float) -> Tensor:
    """[R, H, D] from one query a request: [H, Q, D], [K, T, D] and [K, T, D] of the whole batch."""
    requests, longest = plan.keys.shape
    heads, groups, size = query.shape[0], key.shape[0], query.shape[-1]
    queries = query.index_select(1, plan.queries).transpose(0, 1).reshape(requests, groups, heads // groups, size)
    flat = plan.keys.flatten()
    keys, values = (
        tensor.transpose(0, 1).index_select(0, flat).view(requests, longest, groups, size).transpose(1, 2)
        for tensor in (key, value)
    )
    scores = torch.matmul(queries, keys.transpose(-1, -2)) * scaling  # [R, K, H / K, T]
    scores = scores.masked_fill(plan.padding[:, None, None], float("-inf"))
    weights = _softmax(scores, None if sinks is None else sinks.view(1, groups, heads // groups, 1))
    return torch.matmul(weights.to(values.dtype), values).reshape(requests, heads, size)


def _prefill(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, sinks: Tensor | None, scaling: float) -> Tensor:
    """[Q, H, D] of one request from [H, Q, D], [K, T, D] and [K, T, D]."""
    heads, count, size = query.shape
    groups = key.shape[0]
    queries = query.reshape(groups, heads // groups * count, size)
    scores = (torch.matmul(queries, key.transpose(-1, -2)) * scaling).view(groups, heads // groups, count, -1)
    scores = scores.masked_fill(hidden, float("-inf"))
    weights = _softmax(scores, None if sinks is None else sinks.view(groups, heads // groups, 1, 1))
    mixed = torch.matmul(weights.to(value.dtype).view(groups, -1, key.shape[1]), value)
    return mixed.view(heads, count, size).transpose(0, 1)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the last dimension, in float32, with one more logit a head that takes weight and gives nothing."""
    if sinks is None:
        return scores.softmax(dim=-1, dtype=torch.float32)
    scores = scores.float()
    largest = torch.maximum(scores.amax(dim=-1, keepdim=True), sinks.float())
    weights = (scores - largest).exp_()
    return weights / (weights.sum(dim=-1, keepdim=True) + (sinks.float() - largest).exp())


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)
