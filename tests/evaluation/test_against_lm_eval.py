"""Word and byte perplexity and bits per byte of the tiny model are those that lm-eval itself finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation.local_tasks import write_rolling_task
from transformers import AutoTokenizer

SOURCES = ("shakespeare", "speeches", "code")


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'nexus-ray[eval]'")


def texts_of(source: str) -> list[str]:
    """A text of several windows and a short one, from the repository's held-out text."""
    path = Path(__file__).parents[2] / "assets" / "text" / f"{source}.heldout.jsonl"
    first, second = (json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()[:2])
    return [first[:2500], second[:300]]


def test_all_three_figures_agree_with_the_hugging_face_backend(
    lm_eval, scored, tokenizer_directory, tmp_path, monkeypatch, heldout, tiny_overlay
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "tasks").mkdir()
    for source in SOURCES:
        write_rolling_task(tmp_path / "tasks", f"local_{source}", texts_of(source))
    separator = AutoTokenizer.from_pretrained(tokenizer_directory).convert_tokens_to_ids("<|endoftext|>")
    model = {
        "pretrained": str(tokenizer_directory),
        "dtype": "float32",
        "max_length": 128,
        "prefix_token_id": separator,
    }
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args=model,
        device="cpu",
        batch_size=4,
        tasks=[f"local_{source}" for source in SOURCES],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    for source in SOURCES:
        settings = heldout([{"text": text} for text in texts_of(source)]) | {
            "model.path": str(tokenizer_directory),
            "model.dtype": "float32",
            "data.sequence_length": 128,
            "evaluate.windows": "rolling",
            "evaluate.samples.per_source": 0,
        }
        ours = scored(**settings).sources["play"]["base"]
        for figure in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
            assert ours[figure] == pytest.approx(theirs[f"local_{source}"][f"{figure},none"], rel=1e-5)


@pytest.fixture
def tiny_overlay(tokenizer_directory, tmp_path, write_overlay):
    """A student of the tiny model in place of the micro model's; its shared experts put out nothing."""
    return write_overlay(tokenizer_directory, tmp_path / "run" / "overlay", width=8, std=0)
