"""Top-K compression against torch's own log-softmax."""

from __future__ import annotations

import pytest
import torch

from nexus_ray.targets.compression import compress

# Log-probabilities are stored as float16: 11 significant bits of a value below 32.
HALF = {"rtol": 2**-11, "atol": 2**-11}


def logits(scale: float, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_the_kept_values_are_log_softmax(scale):
    values = logits(scale, 3, 5, 200)
    top = compress(values, 16)
    reference = values.double().log_softmax(-1)
    expected, _ = reference.topk(16)
    assert top.log_probs.dtype == torch.float16
    torch.testing.assert_close(top.log_probs.double(), expected, **HALF)
    torch.testing.assert_close(reference.gather(-1, top.ids), expected)


@pytest.mark.parametrize("k", [1, 7, 64, 199])
def test_top_and_tail_are_a_distribution(k):
    top = compress(logits(3.0, 4, 6, 200), k)
    events = torch.cat([top.log_probs.double(), top.tail_log_prob.double().unsqueeze(-1)], dim=-1)
    torch.testing.assert_close(events.logsumexp(-1), torch.zeros(4, 6, dtype=torch.float64), rtol=0, atol=5e-3)


@pytest.mark.parametrize("k", [1, 7, 64])
def test_the_tail_is_the_mass_of_every_other_token(k):
    values = logits(3.0, 50, 200)
    reference = values.double().log_softmax(-1).sort(-1, descending=True).values[:, k:].logsumexp(-1)
    torch.testing.assert_close(compress(values, k).tail_log_prob.double(), reference, rtol=1e-5, atol=1e-5)


def test_a_tiny_tail_is_accurate():
    """1 - sum(top) would be 0 here, whose logarithm is -infinity."""
    values = torch.tensor([[60.0, 0.0, 0.0, 0.0]])
    tail = compress(values, 1).tail_log_prob
    torch.testing.assert_close(tail, torch.tensor([3.0]).log() - 60.0)


@pytest.mark.parametrize("k", [5, 6, 500])
def test_k_as_large_as_the_vocabulary_keeps_everything(k):
    values = logits(1.0, 2, 5)
    top = compress(values, k)
    assert top.ids.shape == (2, 5)
    assert top.ids.sort(-1).values.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert torch.isfinite(top.tail_log_prob).all(), "a KL against it must stay finite"
    assert (top.tail_log_prob.exp() == 0).all()


def test_masked_tokens_and_half_precision_logits():
    values = logits(1.0, 10).bfloat16()
    values[3] = float("-inf")
    top = compress(values, 9)
    assert 3 not in top.ids
    assert torch.isfinite(top.log_probs).all()
    assert torch.isfinite(top.tail_log_prob)


def test_the_input_is_left_alone():
    values = logits(1.0, 3, 20)
    before = values.clone()
    compress(values, 4)
    assert torch.equal(values, before)
