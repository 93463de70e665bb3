"""Pretraining a micro model: it learns, continues, and exports something stock transformers loads."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from nexus_ray.config import ArchitectureSection, DataSection, PretrainRun, PretrainSection, RunSection, SourceSection
from nexus_ray.errors import ConfigError
from nexus_ray.pretraining.run import pretrain
from nexus_ray.training.watching.metrics import read_metrics

pytestmark = pytest.mark.ray


def _run(directory: Path, texts: Path, tokenizer: Path, steps: int) -> PretrainRun:
    source = SourceSection(train=(f"{texts}/play.train.jsonl",), heldout=(f"{texts}/play.heldout.jsonl",))
    section = PretrainSection(
        tokenizer=tokenizer,
        output=directory / "model",
        architecture=ArchitectureSection(
            layers=1,
            hidden_size=32,
            intermediate_size=32,
            experts=4,
            experts_per_token=2,
            attention_heads=1,
            key_value_heads=1,
        ),
        steps=steps,
        sequences_per_step=4,
        micro_batch_sequences=2,
        validation_sequences=4,
        validate_every=4,
        checkpoint_every=4,
        prompts=("thou art",),
    )
    data = DataSection(sources={"play": source}, sequence_length=64)
    return PretrainRun(run=RunSection(directory=directory), data=data, pretrain=section)


def test_learns_continues_and_exports(
    micro_texts: Path, tokenizer_directory: Path, tmp_path: Path, ray_session: None
) -> None:
    pretrain(_run(tmp_path, micro_texts, tokenizer_directory, steps=4))
    model = pretrain(_run(tmp_path, micro_texts, tokenizer_directory, steps=12))
    records = read_metrics(tmp_path / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["event"] == "step"]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.1
    assert [record["step"] for record in records if record["event"] == "resume"] == [4]
    samples = [(record["step"], record["prompt"]) for record in records if record["event"] == "sample"]
    assert samples == [(record["step"], "thou art") for record in records if record["event"] == "validation"]
    _, info = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    report = json.loads((model / "pretraining.json").read_text())
    assert report["heldout_after_mxfp4"]["play"]["token_perplexity"] > 1

    other = _run(tmp_path, micro_texts, tokenizer_directory, steps=16)
    other = other.model_copy(update={"pretrain": other.pretrain.model_copy(update={"load_balancing": 0.5})})
    with pytest.raises(ConfigError, match=r"reached step 12, .*: pretrain\.load_balancing was 0\.01 and is 0\.5"):
        pretrain(other)
    assert read_metrics(tmp_path / "metrics.jsonl") == records
