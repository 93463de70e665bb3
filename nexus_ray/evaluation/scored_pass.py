"""One model on one scoring batch: what each row costs in nats, and where its tokens were routed.

The LM head runs on the positions that are scored, a few at a time: logits of a whole batch are never held.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from nexus_ray.evaluation.scored_text import IGNORED, ScoringBatch
from nexus_ray.modeling.head import chunks, logits_of
from nexus_ray.modeling.loading import LoadedModel


@torch.no_grad()
def score_batch(loaded: LoadedModel, batch: ScoringBatch) -> tuple[NDArray[np.float64], Tensor]:
    """Run a model on a batch.

    Args:
        loaded: the model; call within `loaded.base()` for the base.
        batch: what to score.

    Returns:
        [rows] negative log-likelihood in nats, float64 sums over float32 log-softmax, and the float32 router logits
        [rows, length, layers, experts].
    """
    input_ids = torch.from_numpy(batch.input_ids).long().to(loaded.device)
    valid = torch.from_numpy(batch.valid).to(loaded.device)
    labels = torch.from_numpy(batch.labels).to(loaded.device)
    hidden, router_logits = loaded.hidden_states(input_ids, valid)
    rows, columns = torch.nonzero(labels != IGNORED, as_tuple=True)
    nats = position_nats(hidden[rows, columns], labels[rows, columns], loaded.head)
    # bincount here, not scattered additions on a GPU: those have no fixed order
    sums = np.bincount(rows.cpu().numpy(), nats.cpu().numpy(), len(batch.units))
    return sums.astype(np.float64), router_logits.float()


def position_nats(hidden: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    """Cross-entropy of each position, a few positions' logits at a time.

    Args:
        hidden: [positions, hidden] after the last norm.
        labels: [positions] the token that each has to predict.
        head: [vocabulary, hidden] weight of the LM head.

    Returns:
        [positions] float64 nats, of float32 log-softmax.
    """
    nats = torch.zeros(len(hidden), dtype=torch.float64, device=hidden.device)
    for part in chunks(hidden, len(head)):
        nats[part] = F.cross_entropy(logits_of(hidden[part], head), labels[part], reduction="none").double()
    return nats
