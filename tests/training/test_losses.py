"""Router losses against torch's own divergences."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_ray.targets.teacher import RouterTargets, TopKTargets
from nexus_ray.training.losses import routers as losses


def _logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _selected(logits: Tensor, k: int, temperature: float = 1.0) -> TopKTargets:
    log_probs = (logits / temperature).log_softmax(-1)
    kept = log_probs.topk(k)
    rest = log_probs.scatter(-1, kept.indices, float("-inf")).logsumexp(-1)
    return TopKTargets(kept.indices, kept.values, rest)


def _merged(logits: Tensor, ids: Tensor) -> Tensor:
    probabilities = logits.softmax(-1)
    kept = probabilities.gather(-1, ids)
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1).log()


def test_full_kl_equals_torch() -> None:
    teacher, student = _logits(3, 4, 9), _logits(3, 4, 9, seed=1)
    expected = _kl(teacher.log_softmax(-1), student.log_softmax(-1))
    assert torch.allclose(losses.full_kl(teacher, student), expected, atol=1e-6)


def test_temperature_keeps_the_gradient_scale() -> None:
    """T^2 KL(p/T) tends to half the variance-weighted squared logit difference for large T (Hinton et al., 2015)."""
    teacher, student = _logits(50, 8), _logits(50, 8, seed=1)
    difference = teacher - student
    limit = difference.var(dim=-1, unbiased=False) / 2
    assert torch.allclose(losses.full_kl(teacher, student, temperature=100.0), limit, rtol=5e-2)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_selected_kl_is_the_kl_of_merged_events_with_autograds_gradient(temperature: float) -> None:
    teacher, student = _logits(40, 3, 12), _logits(40, 3, 12, seed=1).requires_grad_(True)
    targets = _selected(teacher, 4, temperature)
    found = losses.selected_kl(targets, student, temperature)
    expected = _kl(*(_merged(logits / temperature, targets.ids) for logits in (teacher, student))) * temperature**2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    assert (found < losses.full_kl(teacher, student, temperature)).all(), "merging events takes divergence away"


def test_selected_kl_of_all_experts_is_the_full_one() -> None:
    teacher, student = _logits(5, 3, 6), _logits(5, 3, 6, seed=1).requires_grad_(True)
    found = losses.selected_kl(_selected(teacher, 6), student)
    torch.testing.assert_close(found, losses.full_kl(teacher, student))
    found.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("rest", [-60.0, float("-inf")])
def test_selected_kl_is_finite_where_the_rest_has_no_mass(rest: float) -> None:
    student = _logits(5, 3, 8).requires_grad_(True)
    ids = torch.arange(2).expand(5, 3, 2)
    teacher = TopKTargets(ids, torch.full((5, 3, 2), 0.5).log(), torch.full((5, 3), rest))
    value = losses.selected_kl(teacher, student)
    expected = (0.5 * (torch.tensor(0.5).log() - student.log_softmax(-1)[..., :2])).sum(-1)
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("form", ["logits", "selected"])
def test_router_kl_is_the_mean_over_the_layers_with_targets(form: str) -> None:
    teacher, student = _logits(7, 2, 8), _logits(7, 5, 8, seed=1)
    stored = {"logits": teacher} if form == "logits" else {"selected": _selected(teacher, 3, 2.0)}
    found = losses.router_kl(RouterTargets((1, 4), 1, **stored), student, 2.0)
    parts = [losses.full_kl(teacher[:, i], student[:, layer], 2.0) for i, layer in enumerate((1, 4))]
    if form == "selected":
        ids = stored["selected"].ids
        merged = [
            (_merged(teacher[:, i] / 2, ids[:, i]), _merged(student[:, n] / 2, ids[:, i])) for i, n in ((0, 1), (1, 4))
        ]
        parts = [_kl(*pair) * 4 for pair in merged]
    torch.testing.assert_close(found, torch.stack(parts).mean(0), rtol=1e-4, atol=1e-5)
