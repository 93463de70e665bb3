"""Attention that stays within documents: positions that restart, and masks that transformers makes from them.

Documents are joined by a separator, which stands before every document and nowhere inside one: a separator begins a
document. A sequence that begins in the middle of a document has that rest as its first document. Packing without
cross-contamination: Krell et al. 2021, arXiv:2107.02027.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


def document_positions(input_ids: Tensor, valid: Tensor, separator: int) -> Tensor:
    """[sequences, length] int64 position of each token in its document, from 0; each token of padding is alone.

    Args:
        input_ids: [sequences, length].
        valid: [sequences, length] false on padding.
        separator: id of the token that begins a document.
    """
    begins = (input_ids == separator) | ~valid
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return places - places.where(begins, 0).cummax(dim=1).values


def within_documents(model: PreTrainedModel, positions: Tensor) -> dict[str, Any]:
    """Arguments of a decoder's forward pass by which tokens attend to earlier tokens of their own document only.

    Transformers sees a new document wherever positions do not rise by 1. GPT-OSS does not hand positions to its masks,
    so these are made here, one for each kind of layer.

    Args:
        model: whose layers' kinds are among full and sliding attention.
        positions: [sequences, length] of `document_positions`.

    Returns:
        position_ids and, by kind of layer, attention_mask.
    """
    embeddings = model.get_input_embeddings().weight
    shape: dict[str, Any] = {
        "config": model.config,
        "inputs_embeds": torch.empty(*positions.shape, 0, dtype=embeddings.dtype, device=positions.device),
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": positions,
    }
    masks = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    kinds = set(model.config.layer_types)
    return {
        "position_ids": positions,
        "attention_mask": {kind: make(**shape) for kind, make in masks.items() if kind in kinds},
    }
