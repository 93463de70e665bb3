"""Packed sequences for scoring: what `data/packing.py` makes, with the words and bytes of what each predicts."""

from __future__ import annotations

import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from nexus_ray.data.packing import pack_shard, separator_id
from nexus_ray.data.sources import list_shards
from nexus_ray.evaluation.packed_text import PackedText
from nexus_ray.evaluation.scored_text import Part, Wordless, encode_documents
from nexus_ray.evaluation.text_units import TextUnits, words_of_tokens

TEXTS = ["  thou art\n\nthe king " * 12, "naïve café — 東京 🙂 " * 9, "night", "", "one\u00a0two\u2003three"]


@pytest.fixture
def laid_out(trained, heldout):
    """A function (rows, length, **part) -> (sequences of pack_shard, batches, unknown words, tokenizer)."""

    def make(rows, length=16, **part):
        config = trained(**heldout(rows))
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        [shard] = list_shards(config.data, "heldout", ("play",))
        wordless, values = Wordless(), {"limit": None, "first_half": 0.5} | part
        taken = Part(shard, **values)
        layout = PackedText(tokenizer, length, 3)
        batches = list(layout(encode_documents(tokenizer, taken, pytest.fail), taken, wordless))
        sequences = list(pack_shard(shard, tokenizer, length, predict=taken.predict))
        return sequences, batches, wordless.count, tokenizer

    return make


def test_they_are_the_packed_sequences_and_predict_the_same_tokens(laid_out):
    sequences, batches, _, _ = laid_out([{"text": text} for text in TEXTS])
    rows = [(batch, row) for batch in batches for row in range(len(batch.units))]
    for (batch, row), sequence in zip(rows, sequences, strict=True):
        assert batch.input_ids[row].tolist() == sequence.input_ids.tolist()
        assert batch.valid[row].sum() == sequence.num_tokens
        assert (batch.observed == batch.valid).all()
        targets = np.flatnonzero(sequence.is_target)
        assert np.flatnonzero(batch.labels[row] >= 0).tolist() == (targets - 1).tolist()
        assert batch.labels[row][targets - 1].tolist() == sequence.input_ids[targets].tolist()


@pytest.mark.parametrize("length", [8, 16, 1000])
def test_words_and_bytes_of_all_sequences_are_those_of_the_documents(length, laid_out):
    _, batches, wordless, _ = laid_out([{"text": text} for text in TEXTS], length)
    expected = sum((TextUnits.of(text) for text in TEXTS if text), TextUnits(0, 0))
    assert sum(int(batch.words.sum()) for batch in batches) == expected.words
    assert sum(int(batch.num_bytes.sum()) for batch in batches) == expected.num_bytes
    assert wordless == 0


def test_a_limit_counts_the_words_of_the_text_that_is_covered(laid_out):
    text = "a king and his night " * 30
    for limit in (1, 2, 5):
        sequences, batches, _, tokenizer = laid_out([{"text": text}], 16, limit=limit)
        ids = [token for sequence in sequences[:limit] for token in sequence.input_ids[1:].tolist()]
        covered = tokenizer.decode(ids)
        assert text.startswith(covered)
        assert sum(int(batch.num_bytes.sum()) for batch in batches) == len(covered.encode())
        assert sum(int(batch.words.sum()) for batch in batches) == 1 + len(re.findall(r"\s+", covered))


def test_words_of_conversations_are_unknown(laid_out):
    chat = [{"role": "user", "content": "who art thou"}, {"role": "assistant", "content": "thy servant"}]
    _, batches, wordless, tokenizer = laid_out([{"messages": chat}, {"text": "night"}], 64, predict="assistant")
    assert wordless == 1
    labels = np.concatenate([batch.labels[batch.labels >= 0] for batch in batches])
    assert separator_id(tokenizer) in labels.tolist()
    assert "thy servant" in tokenizer.decode(labels)
    assert "who art thou" not in tokenizer.decode(labels)


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_the_words_counted_at_the_tokens_of_a_text_are_its_words(text, micro_model):
    tokenizer = AutoTokenizer.from_pretrained(micro_model)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text, add_special_tokens=False)]
    if "\ufffd" in "".join(pieces):
        pieces = list(text)
    counts = words_of_tokens(text, np.asarray([len(piece.encode()) for piece in pieces]))
    assert counts is not None
    assert counts.sum() == len(re.split(r"\s+", text))
    before = ""
    for piece, count in zip(pieces, counts.tolist(), strict=True):
        starts = [match.start() for match in re.finditer(r"\s+", text)]
        assert count == sum(len(before) <= start < len(before + piece) for start in starts) + (not before)
        before += piece


def test_where_tokens_stand_for_other_bytes_the_places_of_words_are_unknown():
    assert words_of_tokens("one two", np.asarray([3, 3])) is None
    assert words_of_tokens("one two", np.zeros(0, np.int64)) is None
