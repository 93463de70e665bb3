"""Texts that a student continues while it is trained, for people to read."""

from __future__ import annotations

import torch

from nexus_ray.data.packing import separator_id
from nexus_ray.modeling.loading import LoadedModel


@torch.no_grad()
def continue_text(student: LoadedModel, prompt: str, tokens: int) -> dict[str, str]:
    """The most likely continuation of a document that begins with `prompt`.

    Args:
        student: as it is now; random states stay as they are.
        prompt: plain text.
        tokens: of the continuation at most.

    Returns:
        `prompt`, and the continuation as `text`.
    """
    tokenizer = student.tokenizer
    separator = separator_id(tokenizer)
    ids = [separator, *tokenizer.encode(prompt, add_special_tokens=False, split_special_tokens=True)]
    inputs = torch.tensor([ids], device=student.device)
    with torch.random.fork_rng():
        output = student.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=separator,
            pad_token_id=separator,
        )
    return {"prompt": prompt, "text": str(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))}
