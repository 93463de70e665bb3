"""Router probabilities of a few tokens, token by token, for scripts that expect the reference system's file.

`router_probs.npz` holds `router_probs` [tokens, layers, experts] float16, the full softmax, and `metadata`, a JSON
string. It grows with the tokens, as the statistics do not: 9.2 GB for a million tokens of GPT-OSS 120B.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_ray.router.artefact import Description
from nexus_ray.storage import Place, atomic_file, read_bytes

_SUFFIX = ".npy"


class ProbabilityRows:
    """The probabilities of the first `wanted` tokens that it is given."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self._rows: list[NDArray[np.float16]] = []

    def add(self, router_logits: Tensor, valid: NDArray[np.bool_]) -> None:
        """Keep what is still wanted of [sequences, length, layers, experts] logits; padding is left out."""
        missing = self.wanted - sum(len(rows) for rows in self._rows)
        if missing > 0:
            rows = router_logits[torch.as_tensor(valid, device=router_logits.device)][:missing]
            self._rows.append(torch.softmax(rows.float(), dim=-1).half().cpu().numpy())

    def save(self, part: Place) -> None:
        """Write the rows, if any are wanted, beside the file `part`."""
        if self.wanted:
            with atomic_file(part.with_suffix(_SUFFIX)) as temporary, temporary.open("wb") as file:
                np.save(file, np.concatenate(self._rows))


def save_probabilities(path: Place, parts: Sequence[Place], description: Description, model: str) -> None:
    """Join the rows that were saved beside `parts` into one .npz file."""
    rows = np.concatenate([np.load(io.BytesIO(read_bytes(part.with_suffix(_SUFFIX)))) for part in parts])
    metadata = {
        "num_samples": sum(sample.sequences for sample in description.calibration.values()),
        "num_tokens": len(rows),
        "num_layers": description.layers,
        "num_experts": description.experts,
        "top_k": description.experts_per_token,
        "model_name": model,
    }
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, router_probs=rows, metadata=json.dumps(metadata))
