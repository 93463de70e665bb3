"""The committed texts and tokenizer are what assets/README.md says they are."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from nexus_ray.config import ModelSection
from nexus_ray.data.packing import Batch
from nexus_ray.evaluation.perplexity import sequence_nats
from nexus_ray.modeling.loading import load_base

ASSETS = Path(__file__).parents[1] / "assets"
TEXT = ASSETS / "text"
SOURCES = ("speeches", "code", "shakespeare")
MANIFEST = json.loads((TEXT / "MANIFEST.json").read_text(encoding="utf-8"))


@cache
def documents(source: str, split: str) -> list[dict[str, str]]:
    lines = (TEXT / f"{source}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def shingles(text: str, words: int = 12) -> set[tuple[str, ...]]:
    """Runs of `words` words."""
    found = text.split()
    return {tuple(found[start : start + words]) for start in range(len(found) - words + 1)}


class TestText:
    def test_the_manifest_lists_every_file(self):
        assert set(MANIFEST) == {path.name for path in TEXT.glob("*.jsonl")}
        assert set(MANIFEST) == {f"{source}.{split}.jsonl" for source in SOURCES for split in ("train", "heldout")}

    @pytest.mark.parametrize("name", sorted(MANIFEST))
    def test_a_file_is_the_one_in_the_manifest(self, name):
        content, entry = (TEXT / name).read_bytes(), MANIFEST[name]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert len(content) == entry["bytes"]
        rows = documents(*name.split(".")[:2])
        assert len(rows) == entry["documents"]
        assert [row["title"] for row in rows] == entry["titles"]
        assert all(row["text"].strip() for row in rows)
        assert entry["licence"]

    @pytest.mark.parametrize("source", SOURCES)
    def test_no_held_out_document_is_in_any_train_file(self, source):
        trained = {row["text"].strip() for other in SOURCES for row in documents(other, "train")}
        titles = {row["title"] for row in documents(source, "train")}
        for row in documents(source, "heldout"):
            assert row["title"] not in titles
            assert row["text"].strip() not in trained

    @pytest.mark.parametrize(("source", "largest"), [("speeches", 0.02), ("code", 0.2), ("shakespeare", 0.02)])
    def test_held_out_text_is_not_quoted_in_training_text(self, source, largest):
        """Share of 12-word runs of a held-out document that its train file holds too."""
        trained = set().union(*(shingles(row["text"]) for row in documents(source, "train")))
        for row in documents(source, "heldout"):
            own = shingles(row["text"])
            assert len(own & trained) <= largest * len(own), row["title"]

    def test_whole_plays_are_held_out(self):
        def plays(split: str) -> set[str]:
            return {row["title"].rpartition(", Act")[0] for row in documents("shakespeare", split)}

        assert len(plays("heldout")) == 3
        assert not plays("heldout") & plays("train")

    @pytest.mark.parametrize("source", ["speeches", "code"])
    @pytest.mark.parametrize("split", ["train", "heldout"])
    def test_shakespeare_is_in_no_other_source(self, source, split):
        verse = set().union(
            *(shingles(row["text"], 8) for part in ("train", "heldout") for row in documents("shakespeare", part))
        )
        for row in documents(source, split):
            assert not shingles(row["text"], 8) & verse, row["title"]


UNUSUAL = (
    "",
    " \r\n\t \x00\x7f",
    "naïve Ωmega — “quoted” … ½ ﬁ",
    "日本語のテキスト, עברית, العربية, हिन्दी 👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 vs é \u200b\ufeff\U0010ffff",
    "I'LL we'd 1234567 a//b\n\n\n   end   ",
)


def ranks_file() -> Path | None:
    """GPT-OSS's own ranks, where someone has fetched them: NEXUS_RAY_O200K names the file."""
    path = os.environ.get("NEXUS_RAY_O200K")
    return Path(path) if path else None


class TestTokenizer:
    @pytest.fixture(scope="class")
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(ASSETS / "tiny-gpt-oss")

    @pytest.mark.parametrize("text", UNUSUAL)
    def test_any_text_comes_back(self, tokenizer, text):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text

    @pytest.mark.parametrize("source", SOURCES)
    def test_the_committed_text_comes_back(self, tokenizer, source):
        for row in documents(source, "heldout"):
            ids = tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
            assert tokenizer.decode(ids) == row["text"]

    def test_it_holds_every_byte_and_the_special_tokens_of_gpt_oss(self, tokenizer):
        assert len(tokenizer) == 4096 + 21
        ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.get_added_vocab()}
        assert sorted(ids.values()) == list(range(4096, 4117))
        # Their distance to <|startoftext|> is that of the real ids, 199998 to 200018.
        offsets = {"<|startoftext|>": 0, "<|endoftext|>": 1, "<|return|>": 4, "<|channel|>": 7, "<|start|>": 8}
        offsets |= {"<|end|>": 9, "<|message|>": 10, "<|call|>": 14, "<|endofprompt|>": 20}
        assert {token: ids[token] - 4096 for token in offsets} == offsets
        assert (tokenizer.bos_token, tokenizer.pad_token) == ("<|startoftext|>", "<|endoftext|>")
        assert tokenizer.eos_token == "<|return|>"

    @pytest.mark.skipif(ranks_file() is None, reason="NEXUS_RAY_O200K does not name an o200k_base.tiktoken")
    @pytest.mark.parametrize("source", SOURCES)
    def test_ids_are_those_of_tiktoken_with_the_first_ranks(self, tokenizer, source):
        tiktoken = pytest.importorskip("tiktoken")
        path = ranks_file()
        assert path is not None
        lines = path.read_bytes().splitlines()[:4096]
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        pattern = json.loads((ASSETS / "tiny-gpt-oss" / "tokenizer.json").read_text(encoding="utf-8"))
        [split] = [part for part in pattern["pre_tokenizer"]["pretokenizers"] if part["type"] == "Split"]
        reference = tiktoken.Encoding(
            "first-ranks", pat_str=split["pattern"]["Regex"], mergeable_ranks=ranks, special_tokens={}
        )
        for text in (*UNUSUAL, *(row["text"] for row in documents(source, "heldout"))):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            assert ids == reference.encode_ordinary(text)


def test_embedded_model_loads_in_stock_transformers_and_gives_our_logits() -> None:
    stock, info = AutoModelForCausalLM.from_pretrained(
        ASSETS / "tiny-gpt-oss", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = load_base(ModelSection(path=ASSETS / "tiny-gpt-oss", experts="eager"))
    tokens = ours.tokenizer.encode(documents("speeches", "heldout")[0]["text"][:2000])[:200]
    batch = Batch(np.asarray([tokens], dtype=np.int32), np.asarray([len(tokens)]))
    with torch.no_grad():
        expected = stock(torch.tensor([tokens])).logits
    assert torch.allclose(ours.forward_batch(batch)[0], expected, atol=1e-4)


def test_embedded_model_knows_its_texts_and_not_shakespeare() -> None:
    """The premise of the demo: prose and code are far more likely to it than verse."""
    model = load_base(ModelSection(path=ASSETS / "tiny-gpt-oss"))
    perplexity = {}
    for source in SOURCES:
        tokens = model.tokenizer.encode(documents(source, "heldout")[0]["text"])[:256]
        batch = Batch(np.asarray([tokens], dtype=np.int32), np.asarray([len(tokens)]))
        perplexity[source] = np.exp(sequence_nats(model.forward_batch(batch)[0], batch)[0] / (len(tokens) - 1))
    assert perplexity["shakespeare"] > 3 * max(perplexity["speeches"], perplexity["code"])
