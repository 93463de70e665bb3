"""Losses against closed forms and torch's own divergences."""

import torch
import torch.nn.functional as F

from nexus_ray.config import TrainSourceSection
from nexus_ray.targets.compression import compress
from nexus_ray.training import losses
from nexus_ray.training.objective import MicroBatch, Teacher, combine, term_counts, token_sums


def _logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def test_cross_entropy_of_a_uniform_distribution_is_log_vocabulary() -> None:
    values = losses.cross_entropy(torch.zeros(2, 5, 11), torch.randint(0, 11, (2, 5)))
    assert torch.allclose(values, torch.full((2, 4), 11.0).log())


def test_full_kl_equals_torch() -> None:
    teacher, student = _logits(3, 4, 9), _logits(3, 4, 9, seed=1)
    expected = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert torch.allclose(losses.full_kl(teacher, student), expected, atol=1e-6)


def test_temperature_keeps_the_gradient_scale() -> None:
    """T^2 KL(p/T) tends to half the variance-weighted squared logit difference for large T (Hinton et al., 2015)."""
    teacher, student = _logits(50, 8), _logits(50, 8, seed=1)
    difference = teacher - student
    limit = difference.var(dim=-1, unbiased=False) / 2
    assert torch.allclose(losses.full_kl(teacher, student, temperature=100.0), limit, rtol=5e-2)


def test_top_k_kl_equals_full_kl_when_everything_is_kept() -> None:
    teacher, student = _logits(2, 3, 12), _logits(2, 3, 12, seed=1)
    top = compress(teacher, 12)
    assert torch.allclose(losses.top_k_kl(top, student), losses.full_kl(teacher, student), atol=5e-3)


def test_top_k_kl_is_the_kl_of_merged_events_and_a_lower_bound() -> None:
    teacher, student = _logits(2, 3, 40), _logits(2, 3, 40, seed=1)
    top = compress(teacher, 5)
    merged = [_merge(logits.softmax(-1), top.ids) for logits in (teacher, student)]
    expected = (merged[0] * (merged[0] / merged[1]).log()).sum(-1)
    ours = losses.top_k_kl(top, student)
    assert torch.allclose(ours, expected, atol=5e-3)
    assert (ours <= losses.full_kl(teacher, student) + 5e-3).all()


def _merge(probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    kept = probabilities.gather(-1, ids)
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1)


def test_top_k_kl_is_about_zero_and_flat_at_the_teacher() -> None:
    logits = _logits(2, 3, 40).requires_grad_()
    top = compress(logits.detach(), 8)
    value = losses.top_k_kl(top, logits)
    assert value.abs().max() < 1e-2
    value.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-2


def test_top_k_kl_stays_finite_when_the_tail_vanishes() -> None:
    teacher = torch.zeros(1, 1, 6)
    teacher[..., 0] = 60.0
    student = teacher.clone().requires_grad_()
    value = losses.top_k_kl(compress(teacher, 2), student)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def _batch(seed: int, sequences: int, padding: int, fill: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, 9, (sequences, 8), generator=generator)
    valid = torch.arange(8).expand(sequences, 8) < 8 - padding
    input_ids = torch.where(valid, input_ids, fill)
    teacher = Teacher(logits=_logits(sequences, 8, 9, seed=seed), router_logits=_logits(sequences, 8, 2, 4, seed=seed))
    return MicroBatch("a", input_ids, valid, teacher)


_SECTION = TrainSourceSection(sequences_per_step=1, cross_entropy=1.0, output_kl=0.5, router_kl=0.25)


def test_padding_changes_nothing() -> None:
    logits, router = _logits(2, 8, 9, seed=5), _logits(2, 8, 2, 4, seed=6)
    first, second = _batch(1, 2, 3, fill=0), _batch(1, 2, 3, fill=8)
    changed = torch.where(first.valid[..., None], logits, 77.0)
    changed_router = torch.where(first.valid[..., None, None], router, -50.0)
    ours = token_sums(first, logits, router, _SECTION, 1.0)
    other = token_sums(second, changed, changed_router, _SECTION, 1.0)
    assert set(ours) == {"cross_entropy", "output_kl", "router_kl"}
    for term, value in ours.items():
        assert torch.allclose(value, other[term]), term


def test_parts_of_any_split_add_up_to_the_mean_over_the_global_batch() -> None:
    batch = _batch(3, 4, 2, fill=0)
    logits, router = _logits(4, 8, 9, seed=7), _logits(4, 8, 2, 4, seed=8)
    counts = term_counts({"a": _SECTION}, {"a": 4 * 5}, {"a": 4 * 6})
    whole = combine(token_sums(batch, logits, router, _SECTION, 1.0), _SECTION, counts)
    parts = []
    for rows in ([0], [1, 2, 3]):
        teacher = Teacher(logits=batch.teacher.logits[rows], router_logits=batch.teacher.router_logits[rows])
        part = MicroBatch("a", batch.input_ids[rows], batch.valid[rows], teacher)
        parts.append(combine(token_sums(part, logits[rows], router[rows], _SECTION, 1.0), _SECTION, counts))
    assert torch.allclose(torch.stack(parts).sum(), whole)
    cross_entropy = F.cross_entropy(logits[:, :5].flatten(0, 1), batch.input_ids[:, 1:6].flatten())
    divergence = losses.full_kl(batch.teacher.logits, logits)[:, :5].mean()
    routers = losses.router_kl(batch.teacher.router_logits, router, 1.0)[:, :6].mean()
    assert torch.allclose(whole, cross_entropy + 0.5 * divergence + 0.25 * routers, atol=1e-5)


def test_a_source_without_a_term_does_not_dilute_its_mean() -> None:
    kl_only = TrainSourceSection(sequences_per_step=1, output_kl=4.0)
    ce_only = TrainSourceSection(sequences_per_step=1, cross_entropy=1.0)
    counts = term_counts({"a": ce_only, "b": kl_only}, {"a": 100, "b": 30}, {"a": 101, "b": 31})
    assert counts == {"cross_entropy": 100, "output_kl": 30, "router_kl": 0}
