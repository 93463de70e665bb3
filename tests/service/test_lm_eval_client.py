"""The unmodified lm-eval over HTTP: its figures are those of our offline evaluation and of its own backend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from browser import served
from evaluation.local_tasks import write_choice_task, write_rolling_task

from nexus_ray.config import ModelSection
from nexus_ray.evaluation.evaluate import evaluate
from nexus_ray.generation.assistant import Assistant
from nexus_ray.generation.batching.engine import BatchingEngine
from nexus_ray.generation.batching.paged import BatchLimits
from nexus_ray.generation.codec import Codec
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import load_base
from serve.api import build_api
from serve.service import Service

LENGTH = 128
FIGURES = ("word_perplexity", "byte_perplexity", "bits_per_byte")
HELDOUT = Path(__file__).parents[2] / "assets" / "text" / "shakespeare.heldout.jsonl"
QUESTIONS = [
    ("My fellow", [" citizens", " zebras"], 0),
    ("import", [" os", " thee"], 0),
    ("The Congress of the United", [" States", " Yaml"], 0),
]


@pytest.fixture(scope="module")
def texts():
    first, second = (json.loads(line)["text"] for line in HELDOUT.read_text(encoding="utf-8").splitlines()[:2])
    return [first[:1500], second[:300]]


@pytest.fixture(scope="module")
def tiny(tokenizer_directory, tmp_path_factory, write_overlay):
    """An overlay of the embedded model that changes what it says."""
    return write_overlay(tokenizer_directory, tmp_path_factory.mktemp("tiny") / "overlay", width=8, std=0.05)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, texts):
    directory = tmp_path_factory.mktemp("tasks")
    write_rolling_task(directory, "local_text", texts)
    write_choice_task(directory, "local_choice", QUESTIONS)
    return directory


@pytest.fixture(scope="module")
def over_http(tokenizer_directory, tiny, tasks, tmp_path_factory):
    """{model: results} of the command `lm_eval` against the service."""
    base = load_base(ModelSection(path=tokenizer_directory, dtype="float32"))
    engine = BatchingEngine(base, {"bard": tiny}, BatchLimits(cache_tokens=8192))
    codec = Codec.of(base)
    output = tmp_path_factory.mktemp("results")
    results = {}
    with served(build_api(Service(Assistant(engine, codec), LENGTH))) as address:
        for model in engine.models:
            _command(address, model, codec.separator, tokenizer_directory, tasks, output / model)
            [found] = (output / model).rglob("results_*.json")
            results[model] = json.loads(found.read_text())["results"]
    engine.close()
    return results


def _command(address, model, separator, tokenizer, tasks, output):
    # lm-eval takes one token of `max_length` for the answer that it asks for, and one for the prefix.
    settings = {
        "model": model,
        "base_url": f"{address}/v1/completions",
        "tokenizer": tokenizer,
        "max_length": LENGTH + 2,
        "custom_prefix_token_id": separator,
        "num_concurrent": 4,
    }
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in settings.items())]
    command += ["--tasks", "local_text,local_choice", "--include_path", str(tasks), "--output_path", str(output)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(output / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_perplexity_over_http_is_that_of_the_offline_evaluation(
    over_http, micro_config, tokenizer_directory, tiny, texts, tmp_path, ray_session
):
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "overlay").symlink_to(tiny)
    config = micro_config(
        tmp_path / "run",
        **{
            "model.path": str(tokenizer_directory),
            "model.dtype": "float32",
            "data.sequence_length": LENGTH,
            "data.sources.play.heldout": str(heldout),
            "data.sources.prose.heldout": [],
            "evaluate.windows": "rolling",
            "evaluate.samples.per_source": 0,
        },
    )
    ours = evaluate(config, RunLayout(config.run.directory)).sources["play"]
    for model, name in (("base", "base"), ("bard", "student")):
        for figure in FIGURES:
            assert over_http[model]["local_text"][f"{figure},none"] == pytest.approx(ours[name][figure], rel=1e-4)
    assert ours["base"]["bits_per_byte"] != ours["student"]["bits_per_byte"]


def test_the_figures_over_http_are_those_of_lm_eval_s_own_backend(
    over_http, tokenizer_directory, tasks, tmp_path, monkeypatch
):
    import datasets
    from transformers import AutoTokenizer

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    separator = AutoTokenizer.from_pretrained(tokenizer_directory).convert_tokens_to_ids("<|endoftext|>")
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(tokenizer_directory),
            "dtype": "float32",
            "max_length": LENGTH,
            "prefix_token_id": separator,
        },
        device="cpu",
        tasks=["local_text", "local_choice"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    for figure in FIGURES:
        theirs_figure = theirs["local_text"][f"{figure},none"]
        assert over_http["base"]["local_text"][f"{figure},none"] == pytest.approx(theirs_figure, rel=1e-3)
    assert over_http["base"]["local_choice"]["acc,none"] == theirs["local_choice"]["acc,none"] > 0.5
