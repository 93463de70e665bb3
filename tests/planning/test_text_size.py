"""Estimates of the text against tokenising all of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nexus_ray.config import Config
from nexus_ray.planning.text import measure_text


def test_tokens_are_close_to_those_of_the_tokenizer(
    micro_config: Callable[..., Config], micro_texts: Path, micro_model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro_model)
    found = measure_text(micro_config(tmp_path))
    assert sorted(found) == ["play", "prose"]
    for name, text in found.items():
        file = micro_texts / f"{name}.train.jsonl"
        rows = [json.loads(line)["text"] for line in file.read_text().splitlines()]
        assert text.size == file.stat().st_size
        assert text.tokens == pytest.approx(sum(len(tokenizer(row)["input_ids"]) for row in rows), rel=0.1)


def test_json_around_the_text_is_not_counted(
    micro_config: Callable[..., Config], micro_texts: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (micro_texts / "play.train.jsonl").read_text().splitlines()]
    wide = tmp_path / "wide.jsonl"
    wide.write_text("".join(json.dumps(row | {"note": "x" * 2 * len(row["text"])}) + "\n" for row in rows))
    plain = measure_text(micro_config(tmp_path))["play"]
    found = measure_text(micro_config(tmp_path, **{"data.sources.play.train": str(wide)}))["play"]
    assert found.size > 2.5 * plain.size
    assert found.tokens == pytest.approx(plain.tokens, rel=0.02)


def test_a_source_without_files_is_left_out_with_a_warning(
    micro_config: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = micro_config(tmp_path, **{"data.sources.play.train": str(tmp_path / "nowhere.jsonl")})
    with caplog.at_level(logging.WARNING):
        assert list(measure_text(config)) == ["prose"]
    assert "nowhere.jsonl" in caplog.text
