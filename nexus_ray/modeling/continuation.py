"""Greedy continuations: the most likely next tokens, for people to read."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from nexus_ray.modeling.loading import LoadedModel


@torch.no_grad()
def continue_ids(loaded: LoadedModel, ids: Sequence[int], tokens: int, ends: Collection[int]) -> list[int]:
    """The most likely continuation of a prompt, token by token.

    Args:
        loaded: the model as it is now; call within `loaded.base()` for the base. Random states stay as they are.
        ids: the prompt, at least one token.
        tokens: of the continuation at most.
        ends: tokens that end it; the one that did is its last.
    """
    inputs = torch.tensor([list(ids)], device=loaded.device)
    with torch.random.fork_rng():
        output = loaded.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=min(ends),
        )
    continuation: list[int] = output[0, len(ids) :].tolist()
    return continuation
