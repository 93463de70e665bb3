"""Routers while training: means by layer against torch.distributions and brute force, however they are split up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from nexus_ray.targets.teacher import RouterTargets, TopKTargets
from nexus_ray.training.watching.routers import RouterMeter

POSITIONS, LAYERS, EXPERTS, TOP_K = 40, 3, 8, 2


def logits(seed: int, positions: int = POSITIONS) -> Tensor:
    return 2 * torch.randn(positions, LAYERS, EXPERTS, generator=torch.Generator().manual_seed(seed))


def teacher_of(values: Tensor, layers: tuple[int, ...] = (0, 1, 2)) -> RouterTargets:
    return RouterTargets(layers, 1, logits=values[:, list(layers)])


def selected_of(values: Tensor, temperature: float = 1.0) -> RouterTargets:
    log_probs = (values / temperature).log_softmax(-1)
    kept, ids = log_probs.topk(TOP_K, dim=-1)
    ids, order = ids.sort(-1)
    rest = log_probs.scatter(-1, ids, float("-inf")).logsumexp(-1)
    return RouterTargets((0, 1, 2), 1, selected=TopKTargets(ids, kept.gather(-1, order), rest))


def meter(temperature: float = 1.0) -> RouterMeter:
    return RouterMeter(LAYERS, EXPERTS, TOP_K, temperature=temperature)


def recorded(teacher: RouterTargets | None, student: Tensor, temperature: float = 1.0) -> dict[str, list[float]]:
    measured = meter(temperature)
    measured.add(teacher, student)
    return measured.record(measured.sums())


def shared_experts(first: Tensor, second: Tensor) -> list[float]:
    """Mean share of common experts by layer, by sets."""
    shares = torch.zeros(LAYERS)
    for position in range(len(first)):
        for layer in range(LAYERS):
            ours, theirs = (set(each[position, layer].topk(TOP_K).indices.tolist()) for each in (first, second))
            shares[layer] += len(ours & theirs) / TOP_K / len(first)
    return shares.tolist()


def test_kl_l1_and_entropies_are_those_of_torch():
    base, student = logits(0), logits(1)
    found = recorded(teacher_of(base), student)
    p, q = Categorical(logits=base), Categorical(logits=student)
    assert found["kl"] == pytest.approx(kl_divergence(p, q).mean(0).tolist(), rel=1e-5)
    assert found["l1"] == pytest.approx((p.probs - q.probs).abs().sum(-1).mean(0).tolist(), rel=1e-5)
    assert found["entropy"] == pytest.approx(q.entropy().mean(0).tolist(), rel=1e-5)
    assert found["teacher_entropy"] == pytest.approx(p.entropy().mean(0).tolist(), rel=1e-5)


def test_overlap_is_the_share_of_common_experts():
    base, student = logits(0), logits(0) + 0.7 * logits(1)
    assert recorded(teacher_of(base), student)["overlap"] == pytest.approx(shared_experts(base, student), rel=1e-5)


def test_a_student_that_is_its_teacher_does_not_drift():
    found = recorded(teacher_of(logits(0)), logits(0) + 3)
    assert found["kl"] == pytest.approx([0] * LAYERS, abs=1e-6)
    assert found["overlap"] == [1.0] * LAYERS


def test_load_says_who_is_selected_most_and_who_never():
    student = torch.zeros(4, LAYERS, EXPERTS)
    student[:, :, 5] = 9
    student[:2, 0, 1] = 5
    student[2:, 0, 2] = 5
    student[:, 1:, 3] = 5
    found = recorded(None, student)
    assert found["busiest"] == [1.0] * LAYERS
    assert found["unused"] == [EXPERTS - 3, EXPERTS - 2, EXPERTS - 2]


def test_without_a_teacher_there_is_only_the_student():
    assert set(recorded(None, logits(1))) == {"entropy", "busiest", "unused"}


def test_layers_without_targets_are_none_except_for_the_student():
    base, student = logits(0), logits(1)
    part, whole = recorded(teacher_of(base, (0, 2)), student), recorded(teacher_of(base), student)
    for name in ("kl", "l1", "overlap", "teacher_entropy"):
        assert part[name] == [whole[name][0], None, whole[name][2]]
    assert part["entropy"] == whole["entropy"]


def test_nothing_added_records_nothing():
    empty = meter()
    assert empty.record(empty.sums()) == {}
    empty.add(teacher_of(logits(0, 0)), logits(0, 0))
    assert empty.record(empty.sums()) == {}


@pytest.mark.parametrize("cut", [0, 1, 17, POSITIONS])
def test_micro_batches_and_workers_add_up(cut: int):
    base, student = logits(0), logits(1)
    first, second = meter(), meter()
    first.add(teacher_of(base[:cut]), student[:cut])
    second.add(teacher_of(base[cut:]), student[cut:])
    together = first.record(first.sums() + second.sums())
    whole = recorded(teacher_of(base), student)
    assert set(together) == set(whole)
    for name, values in whole.items():
        assert together[name] == pytest.approx(values, rel=2e-5), name


def test_entropies_of_student_and_teacher_are_of_the_same_positions():
    base, student = logits(0), logits(1)
    mixed = meter()
    mixed.add(teacher_of(base), student)
    mixed.add(None, torch.zeros(POSITIONS, LAYERS, EXPERTS))
    found = mixed.record(mixed.sums())
    assert found["entropy"] == pytest.approx(Categorical(logits=student).entropy().mean(0).tolist(), rel=1e-5)


class TestSelectedTargets:
    """Of a teacher that is known by its selected experts, all others are one event."""

    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_kl_and_l1_are_of_the_coarse_distributions(self, temperature: float):
        base, student = logits(0), logits(1)
        targets = selected_of(base, temperature)
        found = recorded(targets, student, temperature)
        assert targets.selected is not None
        coarse = []
        for values in (base, student):
            probs = (values / temperature).softmax(-1)
            kept = probs.gather(-1, targets.selected.ids)
            coarse.append(torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1))
        divergence = kl_divergence(Categorical(probs=coarse[0]), Categorical(probs=coarse[1])).mean(0)
        assert found["kl"] == pytest.approx(divergence.tolist(), rel=1e-4)
        assert found["l1"] == pytest.approx((coarse[0] - coarse[1]).abs().sum(-1).mean(0).tolist(), rel=1e-4)

    def test_they_bound_the_distances_from_below_and_tell_the_overlap(self):
        base, student = logits(0), logits(1)
        known, whole = recorded(selected_of(base), student), recorded(teacher_of(base), student)
        assert known["overlap"] == pytest.approx(whole["overlap"])
        for name in ("kl", "l1"):
            assert all(0 < low < high for low, high in zip(known[name], whole[name], strict=True))

    def test_the_teachers_entropy_is_unknown(self):
        assert recorded(selected_of(logits(0)), logits(1))["teacher_entropy"] == [None] * LAYERS

    def test_a_teacher_that_selects_every_expert_has_no_rest(self):
        base, student = logits(0), logits(1)
        ids = torch.arange(EXPERTS).expand(base.shape)
        tail = torch.full(base.shape[:-1], -1e30)
        targets = RouterTargets((0, 1, 2), 1, selected=TopKTargets(ids, base.log_softmax(-1), tail))
        measured = RouterMeter(LAYERS, EXPERTS, EXPERTS)
        measured.add(targets, student)
        found = measured.record(measured.sums())
        assert found["kl"] == pytest.approx(recorded(teacher_of(base), student)["kl"], rel=1e-5)
        assert found["overlap"] == [1.0] * LAYERS


def test_it_keeps_no_graph():
    student = logits(1).requires_grad_()
    measured = meter()
    measured.add(teacher_of(logits(0)), student * 1.0)
    assert not measured.sums().requires_grad


def test_sums_are_a_copy():
    measured = meter()
    measured.sums().add_(1)
    assert not measured.sums().any()
