"""The LM head a few positions at a time gives the losses of the whole head."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nexus_ray.evaluation.scored_pass import position_nats
from nexus_ray.modeling import head as heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_positions_cost_what_all_of_them_cost_together(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(70, 32, generator=generator), torch.randn(500, 32, generator=generator).to(dtype)
    labels = torch.randint(0, 500, (70,), generator=generator)
    expected = F.cross_entropy((hidden.to(dtype) @ head.T).double(), labels, reduction="none")
    monkeypatch.setitem(heads.CHUNK_BYTES, "cpu", 1)
    found = position_nats(hidden, labels, head)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5 if dtype == torch.float32 else 2e-2)


def test_no_positions_cost_nothing():
    assert position_nats(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long), torch.zeros(5, 8)).tolist() == []
