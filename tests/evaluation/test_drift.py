"""Router drift against closed forms and torch.distributions; padding never counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from nexus_ray.evaluation.drift import DriftSums, router_drift


def random_logits(seed: int, sequences: int = 2, length: int = 5, layers: int = 3, experts: int = 8) -> torch.Tensor:
    return torch.randn(sequences, length, layers, experts, generator=torch.Generator().manual_seed(seed))


EVERYTHING = torch.ones(2, 5, dtype=torch.bool)


def test_identical_routers_do_not_drift():
    logits = random_logits(0)
    means = router_drift(logits, logits.clone(), EVERYTHING, top_k=2).means()
    assert means == {"kl": [0.0] * 3, "l1": [0.0] * 3, "tv": [0.0] * 3, "top_k_overlap": [1.0] * 3}


def test_a_shift_of_all_logits_is_no_drift():
    logits = random_logits(0)
    means = router_drift(logits, logits + 3.0, EVERYTHING, top_k=2).means()
    assert means["kl"] == pytest.approx([0] * 3, abs=1e-6)
    assert means["l1"] == pytest.approx([0] * 3, abs=1e-6)
    assert means["top_k_overlap"] == [1.0] * 3


def test_two_experts_have_the_closed_form():
    p, q = 0.8, 0.3
    base = torch.tensor([math.log(p / (1 - p)), 0.0]).view(1, 1, 1, 2)
    student = torch.tensor([math.log(q / (1 - q)), 0.0]).view(1, 1, 1, 2)
    means = router_drift(base, student, torch.ones(1, 1, dtype=torch.bool), top_k=1).means()
    assert means["kl"][0] == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), rel=1e-6)
    assert means["l1"][0] == pytest.approx(2 * abs(p - q), rel=1e-6)
    assert means["top_k_overlap"] == [0.0]


def test_kl_is_of_the_base_to_the_student_as_torch_computes_it():
    base, student = random_logits(1), random_logits(2)
    reference = kl_divergence(Categorical(logits=base), Categorical(logits=student)).mean(dim=(0, 1))
    backwards = kl_divergence(Categorical(logits=student), Categorical(logits=base)).mean(dim=(0, 1))
    found = router_drift(base, student, EVERYTHING, top_k=2).means()["kl"]
    assert found == pytest.approx(reference.tolist(), rel=1e-5)
    assert found != pytest.approx(backwards.tolist(), rel=1e-2)


def test_overlap_counts_shared_experts_whatever_their_order():
    base = torch.tensor([9.0, 8.0, 7.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 6)
    student = torch.tensor([7.0, 9.0, 0.0, 8.0, 0.0, 0.0]).view(1, 1, 1, 6)
    valid = torch.ones(1, 1, dtype=torch.bool)
    assert router_drift(base, student, valid, top_k=3).means()["top_k_overlap"] == pytest.approx([2 / 3])


def test_padding_does_not_count():
    base, student = random_logits(3), random_logits(4)
    valid = EVERYTHING.clone()
    valid[1, 2:] = False
    garbage = student.clone()
    garbage[1, 2:] = 1e4
    found = router_drift(base, garbage, valid, top_k=2)
    clean = router_drift(base, student, valid, top_k=2)
    assert found.tokens == 7
    assert found.means() == clean.means()
    assert found.means()["kl"] != router_drift(base, student, EVERYTHING, top_k=2).means()["kl"]


def test_parts_merge_into_the_whole():
    base, student = random_logits(5), random_logits(6)
    whole = router_drift(base, student, EVERYTHING, top_k=2)
    first, second = (
        router_drift(base[:, part], student[:, part], EVERYTHING[:, part], 2) for part in (slice(2), slice(2, 5))
    )
    merged = DriftSums.zero(3) + first + second
    assert merged.tokens == whole.tokens
    for name, values in whole.means().items():
        assert np.allclose(merged.means()[name], values, rtol=1e-12)
