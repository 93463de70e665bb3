"""The harmony parser on streams of tokens written by hand."""

import pytest
from transformers import AutoTokenizer

from nexus_ray.generation.harmony import HarmonyTokens
from nexus_ray.generation.request import TokenChoice
from nexus_ray.generation.text import AnswerDecoder, Piece


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory):
    return AutoTokenizer.from_pretrained(tokenizer_directory)


@pytest.fixture(scope="module")
def read(tokenizer):
    """A function from what a model writes, special tokens spelled out, to (content, reasoning, finished)."""

    def read(written: str, stop: tuple[str, ...] = ()) -> tuple[str, str, bool]:
        decoder = AnswerDecoder(HarmonyTokens.of(tokenizer), tokenizer.decode, stop)
        pieces: list[Piece] = []
        for token in tokenizer.encode(written, add_special_tokens=False):
            pieces += decoder.push(TokenChoice(token))
        pieces += decoder.flush()
        content, reasoning = (
            "".join(piece.text for piece in pieces if piece.channel == channel) for channel in ("content", "reasoning")
        )
        return content, reasoning, decoder.finished

    return read


@pytest.mark.parametrize(
    ("written", "content", "reasoning", "finished"),
    [
        ("<|channel|>final<|message|>Good morrow.<|return|>", "Good morrow.", "", True),
        (
            "<|channel|>analysis<|message|>They greet.<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
            "Hi",
            "They greet.",
            True,
        ),
        ("<|channel|>final<|message|>Done<|end|><|start|>user<|message|>More", "Done", "", True),
        ("<|channel|>final<|message|>Cut sho", "Cut sho", "", False),
        ("<|channel|>analysis<|message|>Only thoughts", "", "Only thoughts", False),
        ("<|channel|>analysis<|message|>A<|end|>no header", "no header", "A", False),
        ("<|channel|>analysis<|message|>A<|end|><|end|>late", "", "A", True),
        ("<|channel|>analysis<|message|>A<|end|><|start|>user<|message|>B", "", "A", True),
        ("<|channel|>commentary thinking aloud<|message|>{}<|call|>x", "", "{}", True),
        ("<|channel|>curious<|message|>unknown channel", "unknown channel", "", False),
        ("no header at all<|return|>gone", "no header at all", "", True),
        ("no header<|end|>gone", "no header", "", True),
        ("text<|endoftext|>gone", "text", "", True),
        ("<|message|>bare message<|return|>", "bare message", "", True),
        ("<|start|>assistant<|channel|>final<|message|>again<|return|>", "again", "", True),
        ("one<|reserved_200011|> two<|startoftext|>", "one two", "", False),
        ("<|channel|>fin", "", "", False),
        ("<|return|>", "", "", True),
        ("", "", "", False),
    ],
)
def test_channels(read, written, content, reasoning, finished):
    assert read(written) == (content, reasoning, finished)


def test_a_header_that_never_ends_becomes_content(read):
    text = "thou art the king and I thy servant speak good sir or be silent in this night of sorrow " * 2
    assert read("<|channel|>" + text) == (text, "", False)


def test_stop_strings_cut_the_content_but_not_the_reasoning(read):
    written = (
        "<|channel|>analysis<|message|>STOP is a word<|end|><|start|>assistant"
        "<|channel|>final<|message|>one two STOP three<|return|>"
    )
    assert read(written, ("STOP",)) == ("one two ", "STOP is a word", True)


def test_a_vocabulary_without_the_format_is_all_content():
    tokens = HarmonyTokens(None, None, None, None, frozenset({9}), frozenset({9}))
    decoder = AnswerDecoder(tokens, lambda ids: "".join("abcdefghij"[i] for i in ids))
    assert [decoder.push(TokenChoice(token)) for token in (0, 1, 9, 2)] == [
        [Piece("a", tokens=(TokenChoice(0),))],
        [Piece("b", tokens=(TokenChoice(1),))],
        [],
        [],
    ]
