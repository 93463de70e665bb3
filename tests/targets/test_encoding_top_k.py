"""Top-K targets against float64 log-softmax."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from nexus_ray.config.sections import TargetsSection
from nexus_ray.targets.encoding import chunks
from nexus_ray.targets.encoding.bits import unpack
from nexus_ray.targets.encoding.top_k import TopKEncoding
from nexus_ray.targets.teacher import TopKTargets

torch.set_num_threads(1)

V = 700


def normal(scale: float, seed: int = 0, rows: int = 20, columns: int = V) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def masked() -> torch.Tensor:
    logits = normal(2.0)
    logits[:, ::2] = -torch.inf
    logits[0, 5:] = -torch.inf  # two tokens are left
    return logits


def alone() -> torch.Tensor:
    logits = normal(1.0)
    logits[:, 3] += 1000.0
    return logits


LOGITS = {
    "nearly uniform": normal(0.01),
    "like a model's": normal(3.0),
    "sharp": normal(30.0),
    "a huge range": normal(1e4),
    "all equal": torch.full((3, V), 7.0),
    "many equal": normal(2.0).round(),
    "one outcome alone": alone(),
    "masked tokens": masked(),
    "bfloat16": normal(3.0).bfloat16(),
    "far from zero": normal(3.0) + 5000.0,
}


def round_trip(encoding: TopKEncoding, logits: torch.Tensor) -> TopKTargets:
    columns = encoding.encode(logits)
    assert {name: column.shape[-1] for name, column in columns.items()} == encoding.widths()
    assert {column.dtype for column in columns.values()} == {torch.uint8}
    return encoding.decode(columns)


@pytest.mark.parametrize("k", [1, 2, 64, V - 1, V])
@pytest.mark.parametrize("kind", LOGITS)
def test_kept_outcomes_and_tail_are_a_distribution(kind, k):
    found = round_trip(TopKEncoding(k=k, vocabulary=V), LOGITS[kind])
    events = torch.cat([found.log_probs, found.tail_log_prob.unsqueeze(-1)], dim=-1)
    assert torch.isfinite(events).all()
    assert (events.double().exp().sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("k", [1, 5, 64, 300])
@pytest.mark.parametrize("kind", ["like a model's", "nearly uniform", "sharp"])
def test_the_most_likely_outcomes_are_kept(kind, k):
    logits = LOGITS[kind]
    found = round_trip(TopKEncoding(k=k, vocabulary=V), logits)
    assert torch.equal(found.ids, logits.double().topk(k).indices.sort(-1).values)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 11, 16])
def test_log_probabilities_are_at_most_half_a_level_off(bits):
    k = 64
    found = round_trip(TopKEncoding(k=k, vocabulary=V, value_bits=bits), LOGITS["like a model's"])
    kept = LOGITS["like a model's"].double().gather(-1, found.ids)
    drops = kept.amax(-1, keepdim=True) - kept
    stored = found.log_probs.amax(-1, keepdim=True) - found.log_probs
    second, last = drops.sort(-1).values[:, 1], drops.amax(-1)
    most = (last - second + 0.5) / (2**bits - 2)  # the range, rounded up a little, in so many intervals
    assert ((drops - stored).abs().amax(-1) <= most / 2).all()
    assert (drops - stored).abs().max() > most.min() / 8, "the bound says something"


def test_what_is_kept_together_is_exact():
    """Rounding of values moves probability among the kept outcomes, never between them and the tail."""
    logits = LOGITS["like a model's"]
    for k in (1, 8, 64):
        found = round_trip(TopKEncoding(k=k, vocabulary=V, value_bits=2), logits)
        log_probs = logits.double().log_softmax(-1)
        tail = log_probs.scatter(-1, found.ids, -torch.inf).logsumexp(-1)
        torch.testing.assert_close(found.tail_log_prob.double(), tail, rtol=2**-11, atol=0)


@pytest.mark.parametrize("gap", [5.0, 12.0, 25.0, 50.0])
def test_a_tiny_tail_keeps_its_digits(gap):
    """1 - kept is zero in float32 from a gap of 17 on."""
    logits = torch.zeros(1, V)
    logits[0, 11] = gap
    found = round_trip(TopKEncoding(k=1, vocabulary=V), logits)
    expected = torch.tensor([(V - 1) * torch.tensor(-gap, dtype=torch.float64).exp()]).log1p().neg()
    tail = torch.log(-torch.expm1(expected)) if gap < 25 else torch.tensor([V - 1.0]).log().double() - gap
    torch.testing.assert_close(found.tail_log_prob.double(), tail.double(), rtol=1e-3, atol=0)
    assert found.log_probs.exp().item() == pytest.approx(expected.exp().item(), abs=1e-3)


def test_a_tail_with_nearly_all_mass_keeps_the_digits_of_the_rest():
    """float32 sums of a million probabilities are wrong by a hundred times the one that is kept."""
    logits = normal(1e-3, rows=2, columns=1_000_000)
    found = round_trip(TopKEncoding(k=1, vocabulary=1_000_000), logits)
    expected = logits.double().softmax(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(found.log_probs.exp().double(), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", ["all equal", "many equal", "like a model's", "masked tokens"])
def test_exactly_one_outcome_is_the_first(kind):
    encoding = TopKEncoding(k=20, vocabulary=V, value_bits=5)
    codes = unpack(encoding.encode(LOGITS[kind])["top_values"], 20, 5)
    assert ((codes == 0).sum(-1) == 1).all()


def test_with_every_outcome_kept_the_tail_has_no_mass():
    found = round_trip(TopKEncoding(k=V, vocabulary=V, value_bits=12), LOGITS["like a model's"])
    assert (found.tail_log_prob.exp() < 1e-25).all()
    assert found.ids.tolist() == [list(range(V))] * 20
    expected = LOGITS["like a model's"].double().log_softmax(-1)
    torch.testing.assert_close(found.log_probs.double(), expected, rtol=0, atol=5e-3)


def test_masked_tokens_have_no_probability():
    found = round_trip(TopKEncoding(k=5, vocabulary=V), LOGITS["masked tokens"])
    assert found.log_probs[0].exp().sort().values[:3].max() < 1e-13
    assert (found.ids[1:] % 2 == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_equal_logits_give_equal_bytes_whatever_stands_beside_them(seed, monkeypatch):
    logits = normal(3.0, seed, rows=300).bfloat16()
    encoding = TopKEncoding(k=64, vocabulary=V)
    together = encoding.encode(logits)
    monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", 1)
    apart = encoding.encode(logits)
    alone = encoding.encode(logits[-1:])
    for name, column in together.items():
        assert torch.equal(column, apart[name])
        assert torch.equal(column[-1:], alone[name])


def test_half_precision_logits_are_read_as_they_are():
    encoding = TopKEncoding(k=64, vocabulary=V)
    logits = LOGITS["bfloat16"]
    before = logits.clone()
    columns = encoding.encode(logits)
    assert torch.equal(logits, before), "the input is left alone"
    for name, column in encoding.encode(logits.float()).items():
        assert torch.equal(columns[name], column)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_logits_are_divided_by_the_temperature(temperature):
    logits = LOGITS["like a model's"]
    found = round_trip(TopKEncoding(k=64, vocabulary=V, value_bits=16, temperature=temperature), logits)
    expected = (logits.double() / temperature).log_softmax(-1).gather(-1, found.ids)
    torch.testing.assert_close(found.log_probs.double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("value", "where"), [(torch.nan, 9), (torch.inf, 9), (torch.nan, 0), (-torch.inf, slice(None))]
)
def test_logits_that_are_no_distribution_are_refused(value, where):
    logits = normal(1.0)
    logits[13, where] = value
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        TopKEncoding(k=3, vocabulary=V).encode(logits)


@pytest.mark.parametrize("wrong", [{"k": V + 1}, {"k": 0}, {"value_bits": 1}, {"value_bits": 17}, {"temperature": 0}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong)) if wrong != {"k": V + 1} else "701 most likely of 700"):
        TopKEncoding(**{"k": 4, "vocabulary": V} | wrong)


def test_the_default_bits_are_those_of_the_configuration():
    assert TopKEncoding(k=1, vocabulary=2).value_bits == TargetsSection().value_bits
