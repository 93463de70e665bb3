"""Rolling windows over documents: against transformers window by window, and what counts in them."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from nexus_ray.data.encoding import encode_messages
from nexus_ray.data.sources import list_shards
from nexus_ray.errors import ConfigError, DataError
from nexus_ray.evaluation.rolling_text import RollingText
from nexus_ray.evaluation.scored_text import Part, Wordless, encode_documents
from nexus_ray.modeling.loading import load_base

TEXTS = ["thou art the king " * 40, " good sir,  be\nsilent", "naïve café — 東京 🙂 " * 9, "night"]
ROWS = [{"text": text} for text in TEXTS]
ROLLING = {"evaluate.windows": "rolling", "data.sequence_length": 32}
CHAT = [{"role": "user", "content": "who art thou"}, {"role": "assistant", "content": "thy servant, good sir"}]


def nats_by_hand(model, tokenizer, text: str, length: int, stride: int) -> float:
    """One forward pass a window, each with batch size 1 and the whole head."""
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    stream = [separator, *tokenizer.encode(text, add_special_tokens=False)]
    total, done = 0.0, 0
    while done < len(stream) - 1:
        end = min(length if done == 0 else done + stride, len(stream) - 1)
        inputs = torch.tensor([stream[max(0, end - length) : end]])
        with torch.no_grad():
            logits = model(input_ids=inputs).logits[0, -(end - done) :].double()
        total += F.cross_entropy(logits, torch.tensor(stream[done + 1 : end + 1]), reduction="sum").item()
        done = end
    return total


@pytest.mark.parametrize("stride", [None, 8, 31])
def test_documents_cost_what_transformers_says_window_by_window(stride, trained, scored, heldout):
    settings = ROLLING | heldout(ROWS) | {"evaluate.stride": stride}
    result = scored(**settings).sources["play"]
    base = load_base(trained(**settings).model)
    nats = sum(nats_by_hand(base.model, base.tokenizer, text, 32, stride or 32) for text in TEXTS)
    words = sum(len(re.split(r"\s+", text)) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    tokens = sum(len(base.tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS)
    assert (result["unit"], result["units"], result["tokens"]) == ("document", len(TEXTS), tokens)
    assert (result["words"], result["bytes"]) == (words, size)
    assert result["base"]["token_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert math.log(result["base"]["word_perplexity"]) == pytest.approx(nats / words, rel=1e-5)
    assert result["base"]["byte_perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-5)
    assert result["base"]["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    assert result["student"]["token_perplexity"] != pytest.approx(result["base"]["token_perplexity"], rel=1e-3)


def test_the_batch_size_changes_rounding_only(scored, heldout):
    found = [
        scored(**ROLLING, **heldout(ROWS), **{"evaluate.batch_sequences": size}).sources["play"] for size in (1, 7)
    ]
    for name in ("units", "tokens", "words", "bytes"):
        assert found[0][name] == found[1][name]
    for model in ("base", "student"):
        assert found[0][model]["confidence_interval"] == pytest.approx(found[1][model]["confidence_interval"], rel=1e-5)
    for name in ("kl", "tv", "top_k_overlap"):
        assert found[0]["router_drift"][name] == pytest.approx(found[1]["router_drift"][name], rel=1e-3, abs=1e-6)


@pytest.fixture
def laid_out(trained, heldout):
    """A function (rows, length, stride, batch_rows, **part) -> batches of a shard, and how many had unknown words."""

    def make(rows, length=16, stride=None, batch_rows=4, **part):
        config = trained(**heldout(rows))
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        [shard] = list_shards(config.data, "heldout", ("play",))
        wordless, values = Wordless(), {"limit": None, "first_half": 0.5} | part
        layout = RollingText(tokenizer, length, stride, batch_rows)
        taken = Part(shard, **values)
        return list(layout(encode_documents(tokenizer, taken, pytest.fail), taken, wordless)), wordless.count

    return make


@pytest.mark.parametrize("stride", [None, 5])
def test_each_token_is_predicted_and_observed_once_in_the_document_it_belongs_to(stride, laid_out, micro_model):
    tokenizer = AutoTokenizer.from_pretrained(micro_model)
    batches, _ = laid_out(ROWS, stride=stride)
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    found = [[] for _ in TEXTS]
    for batch in batches:
        for row, unit in enumerate(batch.units.tolist()):
            found[unit] += batch.labels[row][batch.labels[row] >= 0].tolist()
        assert (batch.observed == (batch.labels >= 0)).all()
        assert not (batch.observed & ~batch.valid).any()
    assert [sorted(ids) for ids in found] == [sorted(ids) for ids in expected]


def test_windows_of_similar_length_share_a_batch_and_the_longest_come_first(laid_out):
    batches, _ = laid_out(ROWS, batch_rows=2)
    lengths = [size for batch in batches for size in batch.valid.sum(axis=1).tolist()]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 2


def test_words_and_bytes_of_a_document_stand_in_its_first_window_only(laid_out):
    batches, _ = laid_out(ROWS)
    words = np.zeros(len(TEXTS), int)
    for batch in batches:
        np.add.at(words, batch.units, batch.words)
    assert words.tolist() == [len(re.split(r"\s+", text)) for text in TEXTS]


def test_empty_documents_are_left_out_and_a_limit_is_of_documents(laid_out):
    rows = [{"text": ""}, *ROWS]
    batches, _ = laid_out(rows, limit=2)
    assert {unit for batch in batches for unit in batch.units.tolist()} == {0, 1}
    assert sum(batch.num_bytes.sum() for batch in batches) == sum(len(text.encode()) for text in TEXTS[:2])


def test_halves_keep_documents_whole(laid_out):
    batches, _ = laid_out([{"text": "king " * 50}] * 4)
    halves = {(int(unit), int(half)) for batch in batches for unit, half in zip(batch.units, batch.halves, strict=True)}
    assert halves == {(0, 0), (1, 0), (2, 1), (3, 1)}


def test_of_a_conversation_only_what_the_assistant_wrote_counts_and_its_words_are_unknown(laid_out, micro_model):
    tokenizer = AutoTokenizer.from_pretrained(micro_model)
    batches, wordless = laid_out([{"messages": CHAT}, ROWS[0]], length=512, predict="assistant")
    [labels] = [batch.labels[row] for batch in batches for row in range(len(batch.units)) if batch.units[row] == 0]
    predicted = tokenizer.decode(labels[labels >= 0])
    assert "thy servant, good sir" in predicted
    assert "who art thou" not in predicted
    assert wordless == 1
    asked = len(encode_messages(tokenizer, CHAT[:1], prompt=True, pin_date=True))
    assert (labels[: asked - 1] < 0).all()


def test_a_source_with_conversations_has_no_word_perplexity_but_bits_per_byte(scored, heldout):
    result = scored(**ROLLING, **heldout([{"messages": CHAT}, *ROWS])).sources["play"]
    assert (result["words"], result["documents_without_words"]) == (None, 1)
    assert result["base"]["word_perplexity"] is None
    assert result["base"]["bits_per_byte"] > 0


def test_a_single_document_supports_no_interval(scored, heldout):
    with pytest.raises(DataError, match=r"play\.heldout makes 1 documents") as caught:
        scored(**ROLLING, **heldout(ROWS[:1]))
    assert "evaluate.windows=packed" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluate.stride": 8}, "set evaluate.windows=rolling"),
        (ROLLING | {"evaluate.stride": 33}, "text would be left"),
    ],
)
def test_a_stride_that_cannot_be_is_refused(settings, message, trained):
    with pytest.raises(ConfigError, match=message):
        trained(**settings)


def test_messages_name_the_place_of_a_window(laid_out):
    batches, _ = laid_out(ROWS)
    names = [name for batch in batches for name in batch.names]
    assert all(re.fullmatch(r"at token \d+ of document \d of .*heldout\.jsonl, 0 to \d+", name) for name in names)
    assert len(set(names)) == len(names)
