"""Perplexity, bits per byte and the paired bootstrap, against transformers, closed forms and normal theory."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from nexus_ray.config import ModelSection
from nexus_ray.data.packing import Batch, token_byte_lengths
from nexus_ray.evaluation import perplexity
from nexus_ray.evaluation.perplexity import (
    PairedLosses,
    bits_per_byte,
    paired_bootstrap,
    sequence_nats,
    target_bytes,
    token_perplexity,
)
from nexus_ray.modeling.loading import LoadedModel, load_base


def batch_of(rows: list[list[int]], padding: int = 0) -> Batch:
    """Sequences padded at the end to the longest."""
    length = max(map(len, rows))
    ids = np.asarray([row + [padding] * (length - len(row)) for row in rows], dtype=np.int32)
    return Batch(ids, np.asarray([len(row) for row in rows], dtype=np.int32))


def random_losses(sequences: int, seed: int = 0) -> PairedLosses:
    """Sequences of unequal length; the student gains about 0.05 nats a token on every one of them."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(20, 61, sequences)
    base = targets * rng.normal(4.0, 0.5, sequences)
    student = base + targets * rng.normal(-0.05, 0.1, sequences)
    return PairedLosses(base, student, targets, targets * 4, targets // 2)


@pytest.fixture(scope="module")
def loaded(micro_model: Path) -> LoadedModel:
    return load_base(ModelSection(path=micro_model, device="cpu"))


def test_a_sequence_costs_what_transformers_own_loss_says(loaded: LoadedModel):
    rows = [[5, 17, 300, 41, 2, 900], [8, 8, 1000, 77]]
    batch = batch_of(rows)
    logits, _ = loaded.forward_batch(batch)
    nats = sequence_nats(logits, batch)
    for row, found in zip(rows, nats, strict=True):
        ids = torch.tensor([row])
        with torch.no_grad():
            mean = loaded.model(input_ids=ids, labels=ids).loss.item()
        assert found == pytest.approx(mean * (len(row) - 1), rel=1e-5)


def test_a_sequence_costs_what_its_targets_cost(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(perplexity, "_CHUNK_BYTES", 3 * 4 * loaded.config["vocab_size"])
    rows = [[5, 17, 300, 41, 2, 900, 12, 7], [8, 8, 1000, 77], [3, 1, 4, 1, 5]]
    batch = batch_of(rows)
    predicted = np.random.default_rng(0).random(batch.input_ids.shape) < 0.5
    predicted[2] = False
    batch = Batch(batch.input_ids, batch.num_tokens, predicted)
    logits, _ = loaded.forward_batch(batch)
    nats = sequence_nats(logits, batch)
    for row, chosen, found in zip(rows, predicted, nats, strict=True):
        ids = torch.tensor([row])
        labels = ids.masked_fill(~torch.from_numpy(chosen[: len(row)]), -100)
        count = int(chosen[1 : len(row)].sum())
        with torch.no_grad():
            expected = loaded.model(input_ids=ids, labels=labels).loss.item() * count if count else 0
        assert found == pytest.approx(expected, rel=1e-5)
    sizes = np.arange(loaded.config["vocab_size"])
    for row, chosen, found in zip(rows, predicted.tolist(), target_bytes(batch, sizes), strict=True):
        assert found == sum(token for token, counts in zip(row[1:], chosen[1:], strict=False) if counts)


def test_padding_costs_nothing_whatever_stands_in_it(loaded: LoadedModel):
    alone = batch_of([[8, 8, 1000, 77]])
    nats_alone = sequence_nats(loaded.forward_batch(alone)[0], alone)
    for padding in (0, 3000):
        padded = batch_of([[5, 17, 300, 41, 2, 900, 12, 13], [8, 8, 1000, 77]], padding)
        nats = sequence_nats(loaded.forward_batch(padded)[0], padded)
        assert nats[1] == pytest.approx(nats_alone[0], rel=1e-5)


def test_chunks_of_positions_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch):
    logits = torch.randn(2, 9, 50, generator=torch.Generator().manual_seed(0))
    batch = batch_of([list(range(9)), list(range(10, 15))])
    whole = sequence_nats(logits, batch)
    monkeypatch.setattr(perplexity, "_CHUNK_BYTES", 4 * 50 * 2)
    assert sequence_nats(logits, batch) == pytest.approx(whole, rel=1e-12)


def test_uniform_predictions_have_the_perplexity_of_the_vocabulary():
    batch = batch_of([[1, 2, 3, 4], [5, 6]])
    nats = sequence_nats(torch.zeros(2, 4, 37), batch)
    assert nats == pytest.approx([3 * math.log(37), math.log(37)])
    assert token_perplexity(nats.sum(), batch.is_target.sum()) == pytest.approx(37)


def test_perplexity_divides_by_predicted_tokens_not_by_all_tokens():
    logits = torch.full((1, 3, 4), -30.0)
    logits[0, 0, 1] = logits[0, 1, 2] = 30.0  # both targets are certain; the last position predicts nothing
    batch = batch_of([[0, 1, 2]])
    assert token_perplexity(sequence_nats(logits, batch).sum(), int(batch.is_target.sum())) == pytest.approx(1)


def test_bits_per_byte_of_text_with_known_bytes(tokenizer_directory: Path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    texts = ["To be, or not to be", "naïve café — 東京 🙂"]
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    rows = [[separator, *tokenizer.encode(text, add_special_tokens=False), separator] for text in texts]
    num_bytes = target_bytes(batch_of(rows, padding=separator), token_byte_lengths(tokenizer))
    assert num_bytes.tolist() == [len(text.encode()) for text in texts]
    # A model that is right with probability 1/256 for every byte spends 8 bits on each.
    assert bits_per_byte(num_bytes.sum() * math.log(256), num_bytes.sum()) == pytest.approx(8)


def test_the_first_token_and_padding_stand_for_no_bytes():
    lengths = np.asarray([100, 1, 2, 3])
    assert target_bytes(batch_of([[0, 1, 2], [3, 1]], padding=3), lengths).tolist() == [3, 1]


def test_parts_concatenate_in_order():
    parts = [random_losses(3, seed=1), random_losses(2, seed=2)]
    joined = PairedLosses.concatenate(parts)
    assert len(joined) == 5
    assert joined.base_nats.tolist() == [*parts[0].base_nats, *parts[1].base_nats]
    assert len(PairedLosses.concatenate([])) == 0


def linearised_interval(nats: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """95 % normal interval of a ratio of sums by the delta method (Cochran, Sampling Techniques, chapter 6)."""
    mean = nats.sum() / targets.sum()
    residual = nats - mean * targets
    error = math.sqrt(len(nats) * residual.var(ddof=1)) / targets.sum()
    return mean - 1.959964 * error, mean + 1.959964 * error


def test_intervals_agree_with_normal_theory():
    losses = random_losses(500)
    found = paired_bootstrap(losses, samples=8000, confidence=0.95, seed=3)
    base = linearised_interval(losses.base_nats, losses.targets)
    student = linearised_interval(losses.student_nats, losses.targets)
    difference = linearised_interval(losses.student_nats - losses.base_nats, losses.targets)
    for interval, expected in (
        (np.log(found.base), base),
        (np.log(found.student), student),
        (found.nats_difference, difference),
        (np.log(found.ratio), difference),
    ):
        width = expected[1] - expected[0]
        assert np.abs(np.asarray(interval) - expected).max() < 0.05 * width


def test_pairing_makes_the_interval_of_the_ratio_narrower_than_those_of_its_parts():
    found = paired_bootstrap(random_losses(300), samples=2000, confidence=0.95, seed=0)
    ratio_width, base_width = (math.log(high / low) for low, high in (found.ratio, found.base))
    assert ratio_width < 0.3 * base_width


def test_a_higher_confidence_gives_a_wider_interval_around_the_narrower():
    narrow, wide = (paired_bootstrap(random_losses(100), 2000, level, seed=0).ratio for level in (0.8, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_bootstrap_depends_on_the_seed_only():
    first, again, other = (paired_bootstrap(random_losses(50), 500, 0.95, seed) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_the_bootstrap_does_not_depend_on_how_samples_are_chunked(monkeypatch: pytest.MonkeyPatch):
    whole = paired_bootstrap(random_losses(50), 500, 0.95, seed=7)
    monkeypatch.setattr(perplexity, "_CHUNK_BYTES", 8 * 50 * 33)
    chunked = paired_bootstrap(random_losses(50), 500, 0.95, seed=7)
    assert chunked.ratio == pytest.approx(whole.ratio, rel=1e-12)


def test_equal_losses_have_a_ratio_of_exactly_one():
    losses = random_losses(40)
    equal = PairedLosses(losses.base_nats, losses.base_nats.copy(), losses.targets, losses.num_bytes, losses.words)
    found = paired_bootstrap(equal, 500, 0.95, seed=0)
    assert found.ratio == (1.0, 1.0)
    assert found.nats_difference == (0.0, 0.0)
    assert found.base == found.student
