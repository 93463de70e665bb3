"""How sums over positions become one loss: padding, masks, splits, router positions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_ray.config import RoutersSection, TrainSection, TrainSourceSection
from nexus_ray.targets.reading.reader import TargetBatch
from nexus_ray.targets.teacher import HiddenTargets, RouterTargets
from nexus_ray.training.losses.objective import MicroBatch, Output, loss_of, objective_at, shares, term_counts

WEIGHTS = {
    "cross_entropy": 1.0,
    "output_kl": 0.5,
    "hidden_mse": 0.75,
    "router_kl": 0.25,
    "load_balancing": 0.3,
    "router_z": 0.02,
}
TRAIN = TrainSection(
    sources={"a": TrainSourceSection(sequences_per_step=1, **WEIGHTS)}, routers=RoutersSection(train="all")
)
OBJECTIVE = objective_at(TRAIN, 1.0)
T, H, V, LAYERS, EXPERTS, SELECTED = 8, 5, 9, 3, 4, 2


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(lengths: list[int], *, every: int = 1, layers: tuple[int, ...] = (0, 1, 2), seed: int = 0) -> MicroBatch:
    """Random sequences of these lengths; tokens 0 and 3 of each are predicted by nobody."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = torch.tensor(lengths)
    ids = torch.randint(0, V, (len(lengths), T), generator=generator)
    mask = (torch.arange(T) < num_tokens[:, None]) & (torch.arange(T) % 3 != 0)
    stored = sum(-(-length // every) for length in lengths)
    router = RouterTargets(layers, every, logits=randn(stored, len(layers), EXPERTS, seed=seed + 1))
    output = HiddenTargets(randn(int(mask.sum()), H, seed=seed + 2))
    return MicroBatch("a", TargetBatch(ids, num_tokens, mask, output, router))


def outputs(part: MicroBatch, seed: int = 5) -> Output:
    shape = part.batch.input_ids.shape
    hidden = randn(*shape, H, seed=seed).requires_grad_(True)
    routers = randn(*shape, LAYERS, EXPERTS, seed=seed + 1).requires_grad_(True)
    return Output(hidden, routers, randn(V, H, seed=seed + 2), SELECTED)


def counts(part: MicroBatch) -> dict[str, int]:
    assert part.batch.router is not None
    batch, positions = part.batch, len(part.batch.router.logits)
    return term_counts(
        OBJECTIVE.weights, {"a": int(batch.loss_mask.sum())}, {"a": positions}, {"a": int(batch.num_tokens.sum())}
    )


def loss(part: MicroBatch, output: Output, of: MicroBatch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    return loss_of(part, output, OBJECTIVE, shares(OBJECTIVE.weights["a"], counts(of or part)))


def imbalance(router_logits: Tensor) -> Tensor:
    """The balance of one sequence [t, layers, experts], expert by expert."""
    layers = []
    for logits in router_logits.unbind(1):
        chosen = [set(row.argsort(descending=True)[:SELECTED].tolist()) for row in logits]
        share = [sum(expert in experts for experts in chosen) / SELECTED / len(chosen) for expert in range(EXPERTS)]
        layers.append(EXPERTS * sum(part * logits.softmax(-1)[:, e].mean() for e, part in enumerate(share)))
    return torch.stack(layers).mean()


def position_by_position(part: MicroBatch, output: Output) -> dict[str, Tensor]:
    """The mean of each term by plain loops over sequences and positions."""
    batch, router, stored = part.batch, part.batch.router, 0
    values: dict[str, list[Tensor]] = {term: [] for term in WEIGHTS}
    for row in range(len(batch.input_ids)):
        length = int(batch.num_tokens[row])
        values["load_balancing"] += [imbalance(output.router_logits[row, :length])] * length
        for position in range(length):
            log_sums = output.router_logits[row, position].exp().sum(-1).log()
            values["router_z"].append(log_sums.pow(2).mean())
            if position + 1 < T and batch.loss_mask[row, position + 1]:
                hidden, of_teacher = output.hidden[row, position], batch.output.hidden[len(values["output_kl"])]
                student, teacher = ((output.head @ states).log_softmax(-1) for states in (hidden, of_teacher))
                values["output_kl"].append(F.kl_div(student, teacher, reduction="sum", log_target=True))
                values["cross_entropy"].append(-student[batch.input_ids[row, position + 1]])
                values["hidden_mse"].append(F.mse_loss(hidden, of_teacher))
            if position % router.every == 0:
                pairs = zip(router.layers, router.logits[stored].log_softmax(-1), strict=True)
                students = output.router_logits[row, position].log_softmax(-1)
                layers = [F.kl_div(students[n], log_p, reduction="sum", log_target=True) for n, log_p in pairs]
                values["router_kl"].append(torch.stack(layers).mean())
                stored += 1
    return {term: torch.stack(of_term).mean() for term, of_term in values.items()}


@pytest.mark.parametrize(("every", "layers"), [(1, (0, 1, 2)), (3, (0, 2)), (5, (1,))])
def test_the_loss_is_the_weighted_mean_over_counted_positions(every: int, layers: tuple[int, ...]) -> None:
    part = make([T, 5, 2], every=every, layers=layers)
    output = outputs(part)
    total, sums = loss(part, output)
    means = position_by_position(part, output)
    expected = torch.stack([WEIGHTS[term] * means[term] for term in WEIGHTS]).sum()
    torch.testing.assert_close(total.float(), expected)
    for term, mean in means.items():
        torch.testing.assert_close((sums[term] / counts(part)[term]).float(), mean)
    inputs = (output.hidden, output.router_logits)
    for found, wanted in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_padding_and_masked_tokens_change_nothing() -> None:
    part = make([5, 3])
    output = outputs(part)
    uncounted = F.pad(~part.batch.loss_mask[:, 1:], (0, 1), value=True)
    changed = Output(
        torch.where(uncounted[..., None], 77.0, output.hidden),
        torch.where(part.batch.valid[..., None, None], output.router_logits, -50.0),
        output.head,
        output.experts_per_token,
    )
    # The tokens that nobody predicts, padding among them, are others.
    ids = torch.where(part.batch.loss_mask, part.batch.input_ids, 8)
    other = MicroBatch("a", replace(part.batch, input_ids=ids))
    found, sums = loss(part, output)
    same, same_sums = loss(other, changed)
    assert sums.keys() == WEIGHTS.keys()
    assert torch.equal(found, same)
    assert all(torch.equal(sums[term], same_sums[term]) for term in sums)
    gradient, routers = torch.autograd.grad(found, (output.hidden, output.router_logits))
    assert not gradient[uncounted].any()
    assert not routers[~part.batch.valid].any()


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_parts_of_any_split_add_up_to_the_mean_over_the_global_batch(cut: int) -> None:
    whole = make([T, 6, 3, 7], every=2)
    output = outputs(whole)
    total, sums = loss(whole, output)
    batch, positions = whole.batch, -(-whole.batch.num_tokens // 2)
    targets = batch.loss_mask.sum(-1)
    found, found_sums = torch.zeros((), dtype=torch.float64), []
    for rows in (slice(0, cut), slice(cut, 4)):
        first, first_router = int(targets[: rows.start].sum()), int(positions[: rows.start].sum())
        part = TargetBatch(
            batch.input_ids[rows],
            batch.num_tokens[rows],
            batch.loss_mask[rows],
            HiddenTargets(batch.output.hidden[first : first + int(targets[rows].sum())]),
            replace(batch.router, logits=batch.router.logits[first_router : first_router + int(positions[rows].sum())]),
        )
        of_part = Output(output.hidden[rows], output.router_logits[rows], output.head, SELECTED)
        value, part_sums = loss(MicroBatch("a", part), of_part, of=whole)
        found = found + value
        found_sums.append(part_sums)
    torch.testing.assert_close(found, total)
    for term, value in sums.items():
        torch.testing.assert_close(found_sums[0][term] + found_sums[1][term], value)


@pytest.mark.parametrize("term", WEIGHTS)
def test_a_loss_without_a_weight_never_enters_even_where_all_it_needs_is_there(term: str) -> None:
    part = make([T, 4])
    output = outputs(part)
    total, sums = loss_of(part, output, OBJECTIVE, {term: 0.5})
    assert sums.keys() == {term}
    torch.testing.assert_close(total.detach(), 0.5 * sums[term])
    torch.testing.assert_close(sums[term].float(), position_by_position(part, output)[term] * counts(part)[term])


@pytest.mark.parametrize("term", ["router_kl", "load_balancing", "router_z"])
def test_every_router_term_has_a_gradient_at_every_token_and_every_layer(term: str) -> None:
    part = make([T, 4])
    output = outputs(part)
    gradient = torch.autograd.grad(loss_of(part, output, OBJECTIVE, {term: 1.0})[0], output.router_logits)[0]
    reached = gradient.abs().sum(-1) > 0
    assert torch.equal(reached, part.batch.valid[..., None].expand_as(reached))


def test_a_weight_of_zero_now_measures_without_teaching() -> None:
    part = make([T, 4])
    output = outputs(part)
    total, sums = loss_of(part, output, OBJECTIVE, dict.fromkeys(WEIGHTS, 0.0))
    assert all(value > 0 for value in sums.values())
    gradients = torch.autograd.grad(total, (output.hidden, output.router_logits))
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("term", ["router_kl", "load_balancing", "router_z"])
def test_a_source_with_a_router_term_alone_still_reaches_the_hidden_states(term: str) -> None:
    """With a gradient of zero: data parallelism waits for every parameter, the last layer's among them."""
    part = make([T, 4])
    output = outputs(part)
    total, sums = loss_of(part, output, OBJECTIVE, {term: 0.5})
    gradient = torch.autograd.grad(total, output.hidden)[0]
    assert not gradient.any()
    torch.testing.assert_close(total.detach(), 0.5 * sums[term])


def test_sequences_that_predict_nothing_have_finite_gradients_for_all_outputs() -> None:
    part = make([T, 4])
    unseen = replace(
        part.batch, loss_mask=torch.zeros_like(part.batch.loss_mask), output=HiddenTargets(randn(0, H, seed=1))
    )
    output = outputs(part)
    total, sums = loss_of(MicroBatch("a", unseen), output, OBJECTIVE, OBJECTIVE.weights["a"])
    assert not any(sums[term] for term in ("cross_entropy", "output_kl", "hidden_mse"))
    hidden, routers = torch.autograd.grad(total, (output.hidden, output.router_logits))
    assert not hidden.any()
    assert routers.isfinite().all()
