"""Systematic draws: unbiased, nearer to the distribution than independent ones, never of an impossible token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nexus_ray.targets.encoding import chunks
from nexus_ray.targets.encoding.encodings import SampledEncoding, systematic_draws

torch.set_num_threads(1)

LAST_OFFSET = np.nextafter(1.0, 0.0)


def logits(seed: int, rows: int, columns: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def shares(ids: torch.Tensor, columns: int) -> torch.Tensor:
    ones = torch.full(ids.shape, 1 / ids.shape[-1], dtype=torch.float64)
    return torch.zeros(*ids.shape[:-1], columns, dtype=torch.float64).scatter_add_(-1, ids, ones)


def draw(values: torch.Tensor, draws: int, offsets: torch.Tensor) -> torch.Tensor:
    encoding = SampledEncoding(draws=draws, vocabulary=values.shape[-1])
    return encoding.decode(encoding.encode(values, offsets.double())).ids


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("draws", [1, 5, 12])
def test_averaged_over_all_offsets_draws_are_the_distribution(seed, draws):
    """The integral over the offset by the midpoint rule: a step function's is exact up to one cell at each end."""
    grid = 2000
    values = logits(seed, 1, 50).expand(grid, -1)
    found = draw(values, draws, (torch.arange(grid) + 0.5) / grid)
    p = values[0].double().softmax(-1)
    assert (shares(found, 50).mean(0) - p).abs().max() <= 1.01 / (grid * draws) + 1e-7


def test_averaged_over_random_offsets_draws_are_the_distribution():
    """Every z-score against the exact variance of a count that is one of two neighbouring numbers."""
    repetitions, columns, draws = 4000, 60, 7
    values = logits(1, 1, columns).expand(repetitions, -1)
    offsets = torch.rand(repetitions, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean = shares(draw(values, draws, offsets), columns).mean(0)
    p = values[0].double().softmax(-1)
    upper = (draws * p).frac()
    often = torch.minimum(upper, 1 - upper) * repetitions > 20
    z = (mean - p)[often] / ((upper * (1 - upper) / repetitions).sqrt() / draws)[often]
    assert often.sum() > 10
    assert z.abs().max() < 4
    assert 0.5 < z.square().mean() < 2


def test_the_gradient_varies_less_than_that_of_independent_draws():
    repetitions, columns, draws = 2000, 400, 12
    values = logits(3, 1, columns).expand(repetitions, -1)
    offsets = torch.rand(repetitions, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    p = values[0].double().softmax(-1)
    squared = (shares(draw(values, draws, offsets), columns) - p).square().sum(-1).mean()
    independent = (p * (1 - p)).sum() / draws  # of the mean of draws from p
    assert squared < 0.75 * independent


@pytest.mark.parametrize("offset", [0.0, 0.3, LAST_OFFSET])
@pytest.mark.parametrize("seed", range(5))
def test_no_count_is_further_than_one_draw_from_its_expectation(seed, offset):
    values = logits(seed, 6, 1000, scale=4.0)
    counts = shares(draw(values, 12, torch.full((6,), offset)), 1000) * 12
    assert ((counts - 12 * values.double().softmax(-1)).abs() < 1 + 1e-5).all()


@pytest.mark.parametrize("offset", [0.0, 0.5, LAST_OFFSET])
def test_impossible_tokens_are_never_drawn(offset):
    values = torch.full((3, 900), -torch.inf)
    values[0, 450] = values[0, 451] = 0.0  # zeros before and after
    values[1, 0] = 2.0
    values[2, 899] = -5.0
    found = draw(values, 8, torch.full((3,), offset, dtype=torch.float64))
    assert set(found[0].tolist()) == {450, 451}
    assert found[1:].tolist() == [[0] * 8, [899] * 8]


@pytest.mark.parametrize("draws", [3, 7, 11, 12, 49])
def test_the_last_point_stays_inside_whatever_rounding_does(draws):
    chances = torch.rand(200, 31, generator=torch.Generator().manual_seed(draws), dtype=torch.float64)
    chances[:, -4:] = 0.0
    found = systematic_draws(chances, draws, torch.full((200,), LAST_OFFSET, dtype=torch.float64))
    assert found.max() <= 26


@pytest.mark.parametrize("seed", range(3))
def test_draws_are_the_generalised_inverse_of_the_cumulative_distribution(seed):
    random = np.random.default_rng(seed)
    chances, offsets = random.dirichlet(np.full(300, 0.05), size=20), random.random(20)
    found = systematic_draws(torch.from_numpy(chances) * 3, 9, torch.from_numpy(offsets))  # of any sum
    for row, p, offset in zip(found.numpy(), chances, offsets, strict=True):
        cumulative = np.cumsum(p)
        points = (np.arange(9) + offset) / 9 * cumulative[-1]
        assert [int(np.argmax(cumulative > point)) for point in points] == row.tolist()


def test_rare_tokens_behind_a_likely_one_keep_their_share():
    """In float32 the cumulative distribution would not move for tokens of 1e-9 after one of 0.999."""
    rare = 1_000_000
    chances = torch.full((1, rare + 1), 1e-9, dtype=torch.float64)
    chances[0, 0] = 0.999
    places = torch.tensor([0, 1, 2, 500_000, 999_998, 999_999])
    offsets = 0.999 + (places.double() + 0.5) * 1e-9
    found = systematic_draws(chances.expand(len(places), -1), 1, offsets)
    assert found.flatten().tolist() == (places + 1).tolist()


@pytest.mark.parametrize("scale", [0.01, 3.0, 50.0])
def test_the_entropy_is_that_of_the_whole_distribution(scale):
    values = logits(5, 10, 500, scale) + 300.0
    values[:, 7] = -torch.inf
    encoding = SampledEncoding(draws=3, vocabulary=500, temperature=2.0)
    found = encoding.decode(encoding.encode(values, torch.full((10,), 0.5, dtype=torch.float64))).entropy
    p = (values.double() / 2).softmax(-1)
    torch.testing.assert_close(found.double(), torch.special.entr(p).sum(-1), rtol=1e-4, atol=1e-5)
    assert (found >= 0).all()


def test_the_temperature_divides_the_logits():
    values, offsets = logits(6, 5, 200), torch.rand(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    warm = SampledEncoding(draws=12, vocabulary=200, temperature=2.0).encode(values, offsets)
    halved = SampledEncoding(draws=12, vocabulary=200).encode(values / 2, offsets)
    assert torch.equal(warm["draws"], halved["draws"])


def test_equal_logits_and_offsets_give_equal_bytes_whatever_stands_beside_them(monkeypatch):
    values, offsets = logits(7, 200, 300).bfloat16(), torch.linspace(0, 0.99, 200, dtype=torch.float64)
    encoding = SampledEncoding(draws=12, vocabulary=300)
    together = encoding.encode(values, offsets)
    assert {name: column.shape[-1] for name, column in together.items()} == encoding.widths()
    monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", 1)
    for name, column in encoding.encode(values, offsets).items():
        assert torch.equal(column, together[name])
    for name, column in encoding.encode(values[-1:], offsets[-1:]).items():
        assert torch.equal(column, together[name][-1:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_distribution_are_refused(value):
    values = logits(8, 4, 100)
    values[2, 50] = value
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        draw(values, 3, torch.zeros(4))
