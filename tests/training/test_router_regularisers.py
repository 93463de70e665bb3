"""What keeps trained routers in shape, against transformers' own functions and closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from nexus_ray.training.losses.routers import load_balancing, router_z

B, T, LAYERS, EXPERTS, SELECTED = 3, 10, 2, 8, 2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def valid(*lengths: int) -> Tensor:
    return torch.arange(T) < torch.tensor(lengths)[:, None]


def balance(logits: Tensor, mask: Tensor, selected: int = SELECTED) -> float:
    """The mean over tokens."""
    return float(load_balancing(logits, mask, selected) / mask.sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", [1, 7, T])
def test_one_layer_of_one_sequence_has_transformers_load_balancing_loss(seed: int, length: int) -> None:
    """Which counts every selection once, where ours are shares of the selections."""
    logits = randn(1, T, 1, EXPERTS, seed=seed).requires_grad_(True)
    mask = valid(length)
    expected = load_balancing_loss_func((logits[0, :, 0],), EXPERTS, SELECTED, mask) / SELECTED
    found = load_balancing(logits, mask, SELECTED) / length
    torch.testing.assert_close(found.float(), expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_balance_is_each_sequences_own() -> None:
    """Two sequences that each use one half of the experts are unbalanced, though together they use all."""
    logits = torch.full((2, T, 1, EXPERTS), -50.0)
    for token in range(T):
        for row in range(2):
            logits[row, token, 0, row * 4 + token % 4] = 50.0
    mask = valid(8, 8)
    assert balance(logits, mask, selected=1) == pytest.approx(2.0)
    assert balance(logits.reshape(1, 2 * T, 1, EXPERTS), mask.reshape(1, -1), selected=1) == pytest.approx(1.0)


@pytest.mark.parametrize("selected", [1, 2, 4])
def test_uniform_routing_has_a_balance_of_1(selected: int) -> None:
    """The token after another selects the next experts, in turn."""
    logits = torch.zeros(1, EXPERTS, 1, EXPERTS)
    for token in range(EXPERTS):
        logits[0, token, 0, [(token + n) % EXPERTS for n in range(selected)]] = 1.0
    assert balance(logits, torch.ones(1, EXPERTS, dtype=torch.bool), selected) == pytest.approx(1.0)


@pytest.mark.parametrize("selected", [1, 2, 4])
def test_collapse_onto_as_many_experts_as_are_selected_has_a_balance_of_experts_by_selected(selected: int) -> None:
    logits = torch.full((B, T, LAYERS, EXPERTS), -50.0)
    logits[..., :selected] = 50.0
    assert balance(logits, valid(T, 4, 7), selected) == pytest.approx(EXPERTS / selected)


def test_the_gradient_moves_probability_away_from_the_experts_that_are_used_most() -> None:
    logits = torch.zeros(1, T, 1, EXPERTS)
    logits[..., :SELECTED] = 1.0
    logits.requires_grad_(True)
    load_balancing(logits, valid(T), SELECTED).backward()
    assert (logits.grad[..., :SELECTED] > 0).all()
    assert (logits.grad[..., SELECTED:] < 0).all()


def test_router_z_is_transformers_router_z_loss_of_every_layer() -> None:
    logits = randn(B, T, LAYERS, EXPERTS).requires_grad_(True)
    found = router_z(logits.flatten(0, 1)) / (B * T)
    expected = torch.stack([router_z_loss_func(layer) for layer in logits.unbind(2)]).mean()
    torch.testing.assert_close(found.float(), expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_router_z_of_equal_logits_is_the_square_of_log_experts_and_the_logit() -> None:
    logits = torch.full((5, LAYERS, EXPERTS), -1.5)
    assert float(router_z(logits)) == pytest.approx(5 * (torch.tensor(EXPERTS).log().item() - 1.5) ** 2)


def test_router_z_sees_the_size_of_logits_and_the_balance_does_not() -> None:
    logits = randn(B, T, LAYERS, EXPERTS)
    mask = valid(T, 6, 3)
    assert balance(logits + 7.0, mask) == pytest.approx(balance(logits, mask), rel=1e-5)
    assert router_z(logits[mask] + 7.0) > 4 * router_z(logits[mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_summed_in_full(dtype: torch.dtype) -> None:
    logits = randn(B, T, LAYERS, EXPERTS).to(dtype)
    mask = valid(T, 6, 3)
    assert router_z(logits[mask]) == router_z(logits[mask].float())
    assert load_balancing(logits, mask, SELECTED) == load_balancing(logits.float(), mask, SELECTED)


def test_padding_has_no_part_in_the_balance() -> None:
    logits, mask = randn(B, T, LAYERS, EXPERTS), valid(T, 6, 0)
    alone = [
        load_balancing(logits[row : row + 1, :length], valid(length)[:, :length], 2) for row, length in ((0, T), (1, 6))
    ]
    torch.testing.assert_close(load_balancing(logits, mask, 2), torch.stack(alone).sum())
    changed = torch.where(mask[..., None, None], logits, 1e4 * F.one_hot(torch.tensor(3), EXPERTS))
    assert torch.equal(load_balancing(changed, mask, 2), load_balancing(logits, mask, 2))
