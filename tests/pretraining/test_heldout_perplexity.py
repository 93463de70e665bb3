"""Held-out perplexity of a pretrained model on text with rows that cannot be read."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import GptOssForCausalLM

from nexus_ray.config import DataSection, ModelSection, PretrainRun, PretrainSection, RunSection, SourceSection
from nexus_ray.data.unreadable import UnreadableRows
from nexus_ray.errors import DataError
from nexus_ray.modeling.loading import load_base
from nexus_ray.pretraining.run import heldout_perplexity


@pytest.fixture(scope="module")
def model(micro_model: Path) -> GptOssForCausalLM:
    loaded = load_base(ModelSection(path=micro_model, device="cpu", dtype="float32")).model
    assert isinstance(loaded, GptOssForCausalLM)
    return loaded


def run_on(heldout: Path, tokenizer: Path, tmp_path: Path) -> PretrainRun:
    source = SourceSection(train=(), heldout=(str(heldout),))
    return PretrainRun(
        run=RunSection(directory=tmp_path / "run"),
        data=DataSection(sources={"play": source}, sequence_length=64),
        pretrain=PretrainSection(tokenizer=tokenizer, output=tmp_path / "model"),
    )


def test_they_are_left_out_and_warned_of_once_for_both_models(
    model: GptOssForCausalLM, micro_texts: Path, tokenizer_directory: Path, tmp_path: Path, caplog
) -> None:
    whole = micro_texts / "play.heldout.jsonl"
    (tmp_path / "broken.jsonl").write_text("no json\n" + whole.read_text())
    unreadable = UnreadableRows()
    run = run_on(tmp_path / "broken.jsonl", tokenizer_directory, tmp_path)
    with caplog.at_level(logging.WARNING):
        results = [heldout_perplexity(run, model, unreadable) for _ in range(2)]
    assert results[0] == heldout_perplexity(run_on(whole, tokenizer_directory, tmp_path), model, UnreadableRows())
    [warning] = [record.message for record in caplog.records if "cannot be read" in record.message]
    assert "data.sources.play.heldout: 1 row cannot be read" in warning


def test_text_without_a_readable_row_is_refused(
    model: GptOssForCausalLM, tokenizer_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.jsonl").write_text("no json\n")
    run = run_on(tmp_path / "broken.jsonl", tokenizer_directory, tmp_path)
    with pytest.raises(DataError, match=r"play\.heldout: no row can be read"):
        heldout_perplexity(run, model, UnreadableRows())
