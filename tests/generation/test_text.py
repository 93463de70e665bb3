"""Streaming decoding: pieces are whole characters and join to exactly the text."""

import random

import pytest
from transformers import AutoTokenizer

from nexus_ray.generation.text import IncrementalDecoder, StopStrings

TEXTS = [
    "plain",
    "naïve café",
    "你好、世界",
    "\U0001f469\u200d\U0001f467\u200d\U0001f466 family 🏳️",
    "mixed é\n\t你 🎭!",
    " leading",
    "नमस्ते",
    "\U0010ffff",
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory):
    return AutoTokenizer.from_pretrained(tokenizer_directory)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, text):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    decoder = IncrementalDecoder(tokenizer.decode)
    pieces = [decoder.push(token) for token in tokens]
    assert "".join(pieces) == text
    assert decoder.flush() == ""
    assert not any("\ufffd" in piece for piece in pieces)


def test_characters_do_span_tokens_here(tokenizer):
    """The test above would prove nothing if every character were one token."""
    tokens = tokenizer.encode("🎭", add_special_tokens=False)
    assert len(tokens) > 1
    decoder = IncrementalDecoder(tokenizer.decode)
    assert [decoder.push(token) for token in tokens] == [""] * (len(tokens) - 1) + ["🎭"]


def test_an_unfinished_character_is_flushed_as_a_replacement(tokenizer):
    decoder = IncrementalDecoder(tokenizer.decode)
    first = tokenizer.encode("🎭", add_special_tokens=False)[0]
    assert decoder.push(first) == ""
    assert decoder.flush() == "\ufffd"


def test_random_tokens_join_to_what_the_tokenizer_decodes(tokenizer):
    """Including byte sequences that are not UTF-8."""
    choose = random.Random(0)
    for _ in range(50):
        tokens = [choose.randrange(4096) for _ in range(40)]
        decoder = IncrementalDecoder(tokenizer.decode)
        assert "".join([*map(decoder.push, tokens), decoder.flush()]) == tokenizer.decode(tokens)


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("three", "two"), "one "),
        ("one two", ("twofold",), "one two"),
        ("aaab", ("aab",), "a"),
        ("abababc", ("ababc",), "ab"),
        ("x\n\ny", ("\n\n",), "x"),
        ("start", ("start",), ""),
        ("nothing", (), "nothing"),
    ],
)
def test_stop_strings_cut_at_the_first_however_the_text_arrives(text, stops, shown):
    for size in range(1, len(text) + 1):
        stop = StopStrings(stops)
        parts = [stop.push(text[start : start + size]) for start in range(0, len(text), size)]
        assert "".join([*parts, stop.flush()]) == shown
        assert stop.found == (shown != text)


def test_only_what_may_become_a_stop_string_is_held_back():
    stop = StopStrings(("END",))
    assert [stop.push(part) for part in ("abcE", "N", "x")] == ["abc", "", "ENx"]
