"""Words and bytes are counted as lm-eval's wikitext does; perplexities per unit have closed forms."""

from __future__ import annotations

import math

import pytest

from nexus_ray.evaluation.text_units import TextUnits, unit_perplexity

TEXTS = ["one two  three\n\nfour", " led and trailed by space ", "Grüße, 世界 🌍", "", "\n", "a\u00a0b\u2003c", "x"]


@pytest.mark.parametrize("text", TEXTS)
def test_words_and_bytes_are_those_of_lm_evals_wikitext(text):
    reference = pytest.importorskip(
        "lm_eval.tasks.wikitext.preprocess_wikitext", reason="lm-eval is not installed: pip install 'nexus-ray[eval]'"
    )
    expected = reference.process_results({"page": text}, (-1.0,))
    units = TextUnits.of(text)
    assert (units.words, units.num_bytes) == (expected["word_perplexity"][1], expected["byte_perplexity"][1])


@pytest.mark.parametrize(
    ("text", "words", "num_bytes"),
    [("one two  three\n\nfour", 4, 20), (" padded ", 3, 8), ("Grüße, 世界 🌍", 3, 20), ("", 1, 0)],
)
def test_words_and_bytes_of_texts_counted_by_hand(text, words, num_bytes):
    assert TextUnits.of(text) == TextUnits(words, num_bytes)


def test_units_of_texts_add_up():
    assert TextUnits.of("one two") + TextUnits.of("drei") == TextUnits(3, 11)


def test_a_perplexity_is_of_the_mean_over_units():
    assert unit_perplexity(10 * math.log(7), 10) == pytest.approx(7, rel=1e-12)


def test_what_is_no_finite_number_is_none():
    assert unit_perplexity(5000.0, 1) is None
    assert unit_perplexity(math.inf, 10) is None
    assert unit_perplexity(math.nan, 10) is None
    assert unit_perplexity(3.0, 0) is None
