"""Word and byte perplexity and bits per byte of the tiny model are those that lm-eval itself finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from evaluation.local_tasks import write_rolling_task
from transformers import AutoTokenizer

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import OverlayConfig, save_overlay
from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.families import family_of
from nexus_ray.modeling.loading import activation, build_shared_experts

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
def tiny_overlay(tokenizer_directory, tmp_path):
    """A student of the tiny model in place of the micro model's; its shared experts put out nothing."""
    config = read_model_config(tokenizer_directory)
    sizes = family_of(config).dimensions(config)
    description = OverlayConfig(
        base_fingerprint=fingerprint(tokenizer_directory),
        model_type="gpt_oss",
        layers=sizes.layers,
        hidden_size=sizes.hidden_size,
        width=8,
        token_gate=False,
        scale=1.0,
        learn_scale=False,
        initialisation="zero",
        dtype="float32",
    )
    experts = build_shared_experts(description, activation(family_of(config), config))
    tensors = {name: torch.zeros_like(tensor) for name, tensor in experts.state_dict().items()}
    save_overlay(tmp_path / "run" / "overlay", description, tensors)
    return tmp_path / "run" / "overlay"
