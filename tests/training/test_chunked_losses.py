"""The fused LM head and losses against dense losses on all logits, by autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_ray.modeling import head as lm_head
from nexus_ray.targets.teacher import HiddenTargets, OutputTargets, SampledTargets, TopKTargets
from nexus_ray.training.losses import chunked
from nexus_ray.training.losses.chunked import output_losses

N, H, V, K = 13, 6, 29, 5
BETA = 0.3
FORMS = ("forward_kl", "reverse_kl", "jsd")
MODES = [("topk", form) for form in FORMS] + [("hidden", form) for form in FORMS] + [("sampled", "forward_kl")]
BOTH = {"cross_entropy": 0.7, "output_kl": 0.2}


@dataclass(frozen=True)
class Case:
    """A student and a teacher whose distributions differ a good deal."""

    hidden: Tensor
    head: Tensor
    next_ids: Tensor
    teacher_hidden: Tensor

    def teacher_logits(self, temperature: float = 1.0) -> Tensor:
        return self.teacher_hidden @ self.head.T / temperature

    def targets(self, mode: str, temperature: float = 1.0, k: int = K) -> OutputTargets:
        log_p = self.teacher_logits(temperature).log_softmax(-1)
        if mode == "hidden":
            return HiddenTargets(self.teacher_hidden)
        if mode == "sampled":
            draws = torch.multinomial(log_p.exp(), 40, replacement=True, generator=torch.Generator().manual_seed(9))
            return SampledTargets(draws.sort(-1).values, -(log_p.exp() * log_p).sum(-1))
        kept = log_p.topk(k)
        rest = log_p.scatter(-1, kept.indices, float("-inf")).logsumexp(-1)
        return TopKTargets(kept.indices, kept.values, rest)


def make(seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    hidden, teacher = (torch.randn(N, H, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    head = torch.randn(V, H, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, V, (N,), generator=generator)
    return Case(hidden.to(dtype).requires_grad_(True), head.to(dtype), ids, teacher.to(dtype))


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits as exact as the inputs; training rounds them to float32."""
    monkeypatch.setattr(chunked, "logits_of", lambda hidden, head: hidden @ head.T)


@pytest.fixture
def chunk_size(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that sets the positions of a chunk."""
    return lambda size: monkeypatch.setattr(lm_head, "chunk_positions", lambda vocabulary, device: size)


def dense_divergence(log_p: Tensor, log_q: Tensor, form: str) -> Tensor:
    """By torch's own KL, which takes (log of the second, log of the first)."""
    if form == "forward_kl":
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if form == "reverse_kl":
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    mixture = (BETA * log_p.exp() + (1 - BETA) * log_q.exp()).log()
    halves = [F.kl_div(mixture, part, reduction="sum", log_target=True) for part in (log_p, log_q)]
    return BETA * halves[0] + (1 - BETA) * halves[1]


def merged(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the events [n, K + 1] by adding up probabilities."""
    kept = log_probs.gather(-1, ids)
    others = log_probs.exp().scatter(-1, ids, 0.0).sum(-1, keepdim=True).log()
    return torch.cat([kept, others], dim=-1)


def reference(case: Case, mode: str, form: str, temperature: float) -> dict[str, Tensor]:
    """Both terms over all positions, from logits [N, V]."""
    logits = case.hidden @ case.head.T
    log_q = (logits / temperature).log_softmax(-1)
    log_p = case.teacher_logits(temperature).log_softmax(-1)
    targets = case.targets(mode, temperature)
    if isinstance(targets, TopKTargets):
        value = dense_divergence(merged(log_p, targets.ids), merged(log_q, targets.ids), form)
    elif isinstance(targets, SampledTargets):
        value = -targets.entropy.sum() - log_q.gather(-1, targets.ids).mean(-1).sum()
    else:
        value = dense_divergence(log_p, log_q, form)
    cross_entropy = F.cross_entropy(logits, case.next_ids, reduction="sum")
    return {"cross_entropy": cross_entropy, "output_kl": value * temperature**2}


def ours(case: Case, targets: OutputTargets | None, weights: dict[str, float], **settings: object):
    """(total, sums, gradient) of the fused losses."""
    total, sums = output_losses(case.hidden, case.head, case.next_ids, targets, weights, **settings)
    (gradient,) = torch.autograd.grad(total, case.hidden)
    return total, sums, gradient


@pytest.mark.usefixtures("in_float64")
class TestAgainstDense:
    @pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
    @pytest.mark.parametrize(("mode", "form"), MODES)
    @pytest.mark.parametrize("weights", [BOTH, {"output_kl": 1.3}, {"cross_entropy": 0.4}], ids="+".join)
    def test_values_and_gradients_equal_those_of_dense_autograd(self, mode, form, temperature, weights):
        case = make()
        expected = reference(case, mode, form, temperature)
        expected_total = sum(weight * expected[term] for term, weight in weights.items())
        (expected_gradient,) = torch.autograd.grad(expected_total, case.hidden)
        settings = {"temperature": temperature, "divergence": form, "jsd_beta": BETA}
        total, sums, gradient = ours(case, case.targets(mode, temperature), weights, **settings)
        torch.testing.assert_close(total, expected_total, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-11)
        assert sums.keys() == weights.keys()
        for term, value in sums.items():
            torch.testing.assert_close(value, expected[term].detach(), rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("size", [1, 4, N, 100])
    @pytest.mark.parametrize(("mode", "form"), MODES)
    def test_the_size_of_a_chunk_changes_nothing(self, chunk_size, mode, form, size):
        case = make(1)
        targets = case.targets(mode)
        whole = ours(case, targets, BOTH, divergence=form)
        chunk_size(size)
        parts = ours(case, targets, BOTH, divergence=form)
        torch.testing.assert_close(parts[0], whole[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(parts[2], whole[2], rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("form", FORMS)
    def test_keeping_every_token_is_the_dense_divergence(self, form):
        case = make(2)
        settings = {"divergence": form, "jsd_beta": BETA, "temperature": 2.0}
        every = ours(case, case.targets("topk", 2.0, k=V), {"output_kl": 1.0}, **settings)
        dense = ours(case, case.targets("hidden"), {"output_kl": 1.0}, **settings)
        torch.testing.assert_close(every[0], dense[0])
        torch.testing.assert_close(every[2], dense[2])

    @pytest.mark.parametrize("form", FORMS)
    def test_merging_events_never_adds_divergence(self, form):
        case = make(3)
        sums = [
            output_losses(
                case.hidden, case.head, case.next_ids, case.targets("topk", k=k), {"output_kl": 1.0}, divergence=form
            )[1]["output_kl"].item()
            for k in (1, 3, 9, V)
        ]
        assert 0 < sums[0] < sums[1] < sums[2] < sums[3]

    @pytest.mark.parametrize(("mode", "form"), [pair for pair in MODES if pair[0] != "sampled"])
    def test_a_student_that_is_the_teacher_has_no_divergence_and_no_gradient(self, mode, form):
        case = make(4)
        same = Case(case.hidden, case.head, case.next_ids, case.hidden.detach())
        total, _, gradient = ours(same, same.targets(mode), {"output_kl": 1.0}, divergence=form)
        assert total.abs() < 1e-12
        assert gradient.abs().max() < 1e-12


@pytest.mark.usefixtures("in_float64")
class TestSampled:
    def test_the_mean_gradient_over_many_draws_approaches_the_dense_one(self):
        """Its distance falls with the square root of the draws: 64 times as many, an eighth of the error."""
        case = make(5)
        _, _, dense = ours(case, case.targets("hidden"), {"output_kl": 1.0})
        log_p = case.teacher_logits().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        generator = torch.Generator().manual_seed(0)
        errors = []
        for draws in (1_000, 64_000):
            ids = torch.multinomial(log_p.exp(), draws, replacement=True, generator=generator)
            _, _, gradient = ours(case, SampledTargets(ids, entropy), {"output_kl": 1.0})
            errors.append(float((gradient - dense).norm() / dense.norm()))
        assert errors[1] < 0.01
        assert 4 < errors[0] / errors[1] < 16

    def test_the_expectation_over_every_single_draw_is_the_dense_loss(self):
        """Weighted by their probabilities, all V possible draws of one token give exactly the dense value."""
        case = make(6)
        dense = ours(case, case.targets("hidden"), {"output_kl": 1.0})
        log_p = case.teacher_logits().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        value, gradient = 0.0, torch.zeros_like(case.hidden)
        for token in range(V):
            for row in range(N):
                weight = log_p[row, token].exp()
                one = Case(case.hidden[row : row + 1], case.head, case.next_ids[row : row + 1], case.teacher_hidden)
                targets = SampledTargets(torch.tensor([[token]]), entropy[row : row + 1])
                total, _ = output_losses(one.hidden, one.head, one.next_ids, targets, {"output_kl": 1.0})
                gradient += weight * torch.autograd.grad(total, case.hidden)[0]
                value += float(weight * total.detach())
        assert value == pytest.approx(dense[0].item())
        torch.testing.assert_close(gradient, dense[2])

    def test_a_token_drawn_twice_counts_twice(self):
        case = make(7)
        entropy = torch.zeros(N, dtype=torch.float64)
        ids = torch.arange(3).expand(N, 3)
        repeated = SampledTargets(ids[:, [0, 0, 1, 2, 2, 2]], entropy)
        parts = [SampledTargets(ids[:, [token]], entropy) for token in (0, 1, 2)]
        gradients = [ours(case, part, {"output_kl": 1.0})[2] for part in parts]
        expected = (2 * gradients[0] + gradients[1] + 3 * gradients[2]) / 6
        torch.testing.assert_close(ours(case, repeated, {"output_kl": 1.0})[2], expected)

    def test_other_divergences_are_refused(self):
        case = make(7)
        with pytest.raises(ValueError, match="forward_kl only, not jsd"):
            ours(case, case.targets("sampled"), {"output_kl": 1.0}, divergence="jsd")


@pytest.mark.usefixtures("in_float64")
class TestNoMass:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("tail", [-60.0, -700.0, -1e4, float("-inf")])
    def test_a_teacher_whose_rest_has_no_mass_is_one_over_the_kept_tokens(self, form, tail):
        """The student's own rest has mass: reverse KL alone asks how little the teacher gives it."""
        case = make(8)
        log_q = (case.hidden @ case.head.T).log_softmax(-1)
        ids = case.teacher_logits().topk(K).indices
        kept = case.teacher_logits().gather(-1, ids).log_softmax(-1)
        targets = TopKTargets(ids, kept, torch.full((N,), tail, dtype=torch.float64))
        total, _, gradient = ours(case, targets, {"output_kl": 1.0}, divergence=form, jsd_beta=BETA)
        if form == "reverse_kl" and tail == float("-inf"):
            assert total > 1e300
            return
        least = tail if form == "reverse_kl" else max(tail, -700.0)
        log_p = torch.cat([kept, torch.full((N, 1), least, dtype=torch.float64)], dim=-1)
        expected = dense_divergence(log_p, merged(log_q, ids), form)
        (expected_gradient,) = torch.autograd.grad(expected, case.hidden)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["topk", "hidden"])
def test_float32_stays_finite_and_right_where_events_have_no_probability(mode, form):
    """Logits hundreds of nats apart: probabilities of the rest are 0 in float32, their logarithms are not."""
    rough, exact = make(9, torch.float32, spread=60.0), make(9, spread=60.0)
    targets = rough.targets(mode)
    total, _, gradient = ours(rough, targets, {"output_kl": 1.0}, divergence=form, jsd_beta=BETA)
    logits = exact.hidden @ exact.head.T
    log_p, log_q = exact.teacher_logits().log_softmax(-1), logits.log_softmax(-1)
    if isinstance(targets, TopKTargets):
        log_p, log_q = (_merged_in_logs(values, targets.ids) for values in (log_p, log_q))
    assert log_q.min() < -300
    expected = _in_logs(log_p, log_q, form)
    (expected_gradient,) = torch.autograd.grad(expected, exact.hidden)
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-3)


def _merged_in_logs(log_probs: Tensor, ids: Tensor) -> Tensor:
    others = log_probs.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, ids), others], dim=-1)


def _in_logs(log_p: Tensor, log_q: Tensor, form: str) -> Tensor:
    if form != "jsd":
        return dense_divergence(log_p, log_q, form)
    parts = torch.stack([log_p + torch.tensor(BETA).log(), log_q + torch.tensor(1 - BETA).log()])
    mixture = parts.logsumexp(0)
    halves = [F.kl_div(mixture, part, reduction="sum", log_target=True) for part in (log_p, log_q)]
    return BETA * halves[0] + (1 - BETA) * halves[1]


@pytest.mark.parametrize(("mode", "form"), MODES)
def test_a_bfloat16_head_gives_what_autograd_through_it_gives(mode, form):
    """Logits and their gradient are rounded to bfloat16, as a model that computes in it does."""
    case = make(10, torch.bfloat16)
    logits = F.linear(case.hidden, case.head).float()
    wide = Case(logits, torch.eye(V), case.next_ids, F.linear(case.teacher_hidden, case.head).float())
    expected = reference(wide, mode, form, 1.0)
    total = BOTH["cross_entropy"] * expected["cross_entropy"] + BOTH["output_kl"] * expected["output_kl"]
    (gradient,) = torch.autograd.grad(total, case.hidden)
    targets = case.targets(mode) if mode == "hidden" else wide.targets(mode)
    found = ours(case, targets, BOTH, divergence=form, jsd_beta=BETA)
    torch.testing.assert_close(found[0], total.double(), rtol=1e-5, atol=1e-5)
    assert found[2].dtype == torch.bfloat16
    torch.testing.assert_close(found[2], gradient, rtol=2**-6, atol=2**-6)


class TestTheFunction:
    def test_the_upstream_gradient_scales_the_gradient(self):
        case = make(11, torch.float32)
        total, _ = output_losses(case.hidden, case.head, case.next_ids, None, {"cross_entropy": 1.0})
        (once,) = torch.autograd.grad(total, case.hidden, retain_graph=True)
        (scaled,) = torch.autograd.grad(3 * total, case.hidden)
        torch.testing.assert_close(scaled, 3 * once)

    def test_the_head_gets_no_gradient(self):
        case = make(11, torch.float32)
        head = case.head.clone().requires_grad_(True)
        output_losses(case.hidden, head, case.next_ids, None, {"cross_entropy": 1.0})[0].backward()
        assert head.grad is None
        assert case.hidden.grad is not None

    def test_without_gradients_the_sums_are_the_same_and_nothing_is_kept(self):
        case = make(12, torch.float32)
        targets = case.targets("topk")
        with_gradient, sums = output_losses(case.hidden, case.head, case.next_ids, targets, BOTH)
        with torch.no_grad():
            without, same = output_losses(case.hidden, case.head, case.next_ids, targets, BOTH)
        assert not without.requires_grad
        assert torch.equal(without, with_gradient)
        assert all(torch.equal(sums[term], same[term]) for term in BOTH)

    def test_inputs_and_targets_are_left_as_they_were(self):
        for mode, form in MODES:
            case = make(12, torch.float32)
            targets = case.targets(mode)
            before = [tensor.clone() for tensor in (case.hidden, case.head, *vars(targets).values())]
            ours(case, targets, BOTH, temperature=2.0, divergence=form)
            after = (case.hidden, case.head, *vars(targets).values())
            assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))

    def test_a_weight_of_zero_measures_without_teaching(self):
        case = make(13, torch.float32)
        total, sums, gradient = ours(case, case.targets("topk"), {"cross_entropy": 0.0, "output_kl": 0.5})
        alone = ours(case, case.targets("topk"), {"output_kl": 0.5})
        assert sums["cross_entropy"] > 0
        assert torch.equal(total, alone[0])
        assert torch.equal(gradient, alone[2])

    def test_no_positions_have_no_loss(self):
        case = make(13, torch.float32)
        none = Case(case.hidden[:0], case.head, case.next_ids[:0], case.teacher_hidden[:0])
        total, sums = output_losses(none.hidden, none.head, none.next_ids, none.targets("topk"), BOTH)
        total.backward()
        assert total == 0
        assert sums == {"cross_entropy": 0, "output_kl": 0}

    @pytest.mark.parametrize("mode", ["topk", "sampled", "hidden"])
    def test_targets_of_other_positions_are_refused(self, mode):
        case = make(14, torch.float32)
        fewer = Case(case.hidden, case.head, case.next_ids, case.teacher_hidden[:-1])
        with pytest.raises(ValueError, match=f"targets of {N - 1} positions for {N}"):
            ours(case, fewer.targets(mode), BOTH)
        with pytest.raises(ValueError, match=f"targets of 0 positions for {N}"):
            ours(case, None, BOTH)

    def test_no_tensor_of_all_positions_and_the_vocabulary_is_ever_made(self, chunk_size):
        """Every tensor that an operation returns is looked at."""
        from torch.utils._python_dispatch import TorchDispatchMode

        chunk_size(3)
        largest = 0

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal largest
                result = function(*args, **(kwargs or {}))
                for tensor in result if isinstance(result, tuple | list) else (result,):
                    if isinstance(tensor, Tensor):
                        largest = max(largest, tensor.numel())
                return result

        for mode, form in MODES:
            case = make(15, torch.float32)
            targets = case.targets(mode)
            with Watch():
                output_losses(case.hidden, case.head, case.next_ids, targets, BOTH, divergence=form)[0].backward()
        assert largest == max(V * H, 3 * V, N * H)
