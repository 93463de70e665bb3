"""How sums over positions become one loss: padding, masks, splits, router positions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_ray.config import TrainSection, TrainSourceSection
from nexus_ray.targets.reading.reader import TargetBatch
from nexus_ray.targets.teacher import HiddenTargets, RouterTargets
from nexus_ray.training.objective import MicroBatch, Output, loss_of, shares, term_counts

SECTION = TrainSourceSection(sequences_per_step=1, cross_entropy=1.0, output_kl=0.5, router_kl=0.25)
TRAIN = TrainSection(sources={"a": SECTION})
T, H, V, LAYERS, EXPERTS = 8, 5, 9, 3, 4


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
    return Output(hidden, routers, randn(V, H, seed=seed + 2))


def counts(part: MicroBatch) -> dict[str, int]:
    assert part.batch.router is not None
    positions = len(part.batch.router.logits)
    return term_counts({"a": SECTION}, {"a": int(part.batch.loss_mask.sum())}, {"a": positions})


def loss(part: MicroBatch, output: Output, of: MicroBatch | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    return loss_of(part, output, TRAIN, shares(SECTION, counts(of or part)))


def position_by_position(part: MicroBatch, output: Output) -> Tensor:
    """The mean of each term by plain loops over sequences and positions."""
    batch, router = part.batch, part.batch.router
    stored, divergences, routers, cross_entropy = 0, [], [], []
    for row in range(len(batch.input_ids)):
        for position in range(int(batch.num_tokens[row])):
            if position + 1 < T and batch.loss_mask[row, position + 1]:
                student = (output.head @ output.hidden[row, position]).log_softmax(-1)
                teacher = (output.head @ batch.output.hidden[len(divergences)]).log_softmax(-1)
                divergences.append(F.kl_div(student, teacher, reduction="sum", log_target=True))
                cross_entropy.append(-student[batch.input_ids[row, position + 1]])
            if position % router.every == 0:
                pairs = zip(router.layers, router.logits[stored].log_softmax(-1), strict=True)
                students = output.router_logits[row, position].log_softmax(-1)
                values = [F.kl_div(students[n], log_p, reduction="sum", log_target=True) for n, log_p in pairs]
                routers.append(torch.stack(values).mean())
                stored += 1
    means = [torch.stack(values).mean() for values in (cross_entropy, divergences, routers)]
    return means[0] + 0.5 * means[1] + 0.25 * means[2]


@pytest.mark.parametrize(("every", "layers"), [(1, (0, 1, 2)), (3, (0, 2)), (5, (1,))])
def test_the_loss_is_the_weighted_mean_over_counted_positions(every: int, layers: tuple[int, ...]) -> None:
    part = make([T, 5, 2], every=every, layers=layers)
    output = outputs(part)
    total, _ = loss(part, output)
    expected = position_by_position(part, output)
    torch.testing.assert_close(total.float(), expected)
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
    )
    # The tokens that nobody predicts, padding among them, are others.
    ids = torch.where(part.batch.loss_mask, part.batch.input_ids, 8)
    other = MicroBatch("a", replace(part.batch, input_ids=ids))
    found, sums = loss(part, output)
    same, same_sums = loss(other, changed)
    assert set(sums) == {"cross_entropy", "output_kl", "router_kl"}
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
        of_part = Output(output.hidden[rows], output.router_logits[rows], output.head)
        value, part_sums = loss(MicroBatch("a", part), of_part, of=whole)
        found = found + value
        found_sums.append(part_sums)
    torch.testing.assert_close(found, total)
    for term, value in sums.items():
        torch.testing.assert_close(found_sums[0][term] + found_sums[1][term], value)


def test_a_source_without_a_term_does_not_dilute_its_mean() -> None:
    kl_only = TrainSourceSection(sequences_per_step=1, output_kl=4.0)
    ce_only = TrainSourceSection(sequences_per_step=1, cross_entropy=1.0)
    found = term_counts({"a": ce_only, "b": kl_only}, {"a": 100, "b": 30}, {"a": 101, "b": 31})
    assert found == {"cross_entropy": 100, "output_kl": 30, "router_kl": 0}
    assert shares(kl_only, found) == {"output_kl": 4.0 / 30}


def test_the_router_term_counts_positions_with_router_targets() -> None:
    routed = TrainSourceSection(sequences_per_step=1, router_kl=1.0)
    assert term_counts({"a": routed, "b": SECTION}, {"a": 7, "b": 9}, {"a": 3, "b": 4})["router_kl"] == 7


def test_a_source_with_the_router_term_alone_still_reaches_the_hidden_states() -> None:
    """With a gradient of zero: data parallelism waits for every parameter, the last layer's among them."""
    part = make([T, 4])
    output = outputs(part)
    total, sums = loss_of(part, output, TRAIN, {"router_kl": 0.5})
    gradient = torch.autograd.grad(total, output.hidden)[0]
    assert not gradient.any()
    torch.testing.assert_close(total.detach(), 0.5 * sums["router_kl"])
