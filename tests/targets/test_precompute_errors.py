"""What cannot become a target set is refused with the field or the file, what was found, and the next step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from precompute_here import precompute_here, run_workers_here
from torch import Tensor

from nexus_ray.errors import ConfigError, DataError, ModelError, NexusError
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import LoadedModel
from nexus_ray.pipeline import Run, forget, run_pipeline
from nexus_ray.targets.format import MANIFEST
from nexus_ray.targets.writing import job as job_module
from nexus_ray.targets.writing.job import job_of_run
from nexus_ray.targets.writing.precompute import precompute


@pytest.fixture(autouse=True)
def _workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    run_workers_here(monkeypatch)


ROUTERS = {"train.sources.prose.router_kl": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets.top_k": 4118}, r"targets\.top_k=4118 is more than the model's vocabulary of 4117"),
        ({"targets.router_layers": [0, 2], **ROUTERS}, r"targets\.router_layers names layer 2, .* layers 0 to 1"),
        ({"data.sequence_length": 2049}, r"data\.sequence_length=2049 is longer .* max_position_embeddings is 2048"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_any_work(settings, message, micro_config, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        job_of_run(micro_config(tmp_path / "run", **settings))
    assert caught.value.hint


@pytest.mark.parametrize(
    "settings",
    [
        {"targets.top_k": 4117},
        {"data.sequence_length": 2048},
        {"targets.top_k": 5000, "train.mode": "online"},
        {"targets.router_layers": [9]},
    ],
)
def test_settings_at_the_limit_or_without_effect_are_taken(settings, micro_config, tmp_path) -> None:
    job_of_run(micro_config(tmp_path / "run", **settings))


def test_sequences_whose_targets_do_not_fit_into_a_value_are_refused(micro_config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(job_module, "_MOST_BYTES_OF_A_VALUE", 5000)
    job_of_run(micro_config(tmp_path / "run"))
    settings = {"targets.mode": "hidden", "data.sequence_length": 256}
    with pytest.raises(ConfigError, match=r"data\.sequence_length=256 gives [\d,]+ bytes of hidden\w* a sequence"):
        job_of_run(micro_config(tmp_path / "run", **settings))


@pytest.mark.parametrize("text", ["a word", ""])
def test_text_that_is_shorter_than_a_sequence_is_refused(text, micro_config, tmp_path) -> None:
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": text}) + "\n")
    config = micro_config(tmp_path / "run", **{"data.sources.prose.train": str(tmp_path / "short.jsonl")})
    with pytest.raises(DataError, match=r"data\.sources\.prose\.train holds \d tokens, less than one sequence \(64\)"):
        precompute_here(config, tmp_path / "targets")
    assert not (tmp_path / "targets" / MANIFEST).exists()


def test_an_empty_file_is_refused(micro_config, tmp_path) -> None:
    (tmp_path / "empty.jsonl").touch()
    config = micro_config(tmp_path / "run", **{"data.sources.prose.train": str(tmp_path / "empty.jsonl")})
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        precompute_here(config, tmp_path / "targets")


def test_few_wanted_tokens_are_a_sequence_at_least(micro_config, tmp_path) -> None:
    config = micro_config(tmp_path / "run", **{"targets.max_tokens": 1, "train.mode": "online"})
    manifest = precompute_here(config, tmp_path / "targets")
    assert {file.source for file in manifest.files} == {"play", "prose"}


@pytest.mark.parametrize(
    ("settings", "broken", "message"),
    [
        ({}, "hidden", "final hidden states are NaN or infinite"),
        ({"targets.mode": "hidden"}, "hidden", "final hidden states are NaN or infinite"),
        ({}, "head", "logits cannot be stored"),
        (ROUTERS, "router", "router logits are NaN or infinite"),
    ],
)
def test_a_model_that_gives_nan_is_an_error_that_names_the_text(
    settings, broken, message, micro_config, tmp_path, monkeypatch
) -> None:
    states = LoadedModel.hidden_states

    def hidden_states(self: LoadedModel, input_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        hidden, routers = states(self, input_ids, valid)
        if broken == "head":
            self.head[7] = float("nan")
        else:
            (hidden if broken == "hidden" else routers)[0, 3, -1] = float("inf")
        return hidden, routers

    monkeypatch.setattr(LoadedModel, "hidden_states", torch.no_grad()(hidden_states))
    with pytest.raises(
        NexusError, match=rf"prose\.train\.jsonl \[[\d,]+ to [\d,]+\]: the teacher's {message}"
    ) as caught:
        precompute_here(micro_config(tmp_path / "run", **settings), tmp_path / "targets")
    assert isinstance(caught.value, DataError)
    assert not list(Path(tmp_path / "targets").glob(".*.partial"))


def test_the_whole_pipeline_refuses_them_before_its_first_stage(micro_config, tmp_path) -> None:
    config = micro_config(tmp_path / "run", **{"targets.top_k": 4118})
    with pytest.raises(ConfigError, match="more than the model's vocabulary"):
        run_pipeline(config)
    assert not RunLayout(config.run.directory).stages.exists()


def test_a_worker_with_another_model_or_tokenizer_makes_nothing(micro_config, tmp_path, monkeypatch) -> None:
    config = micro_config(tmp_path / "run")
    job = job_of_run(config)
    for change, message in (
        (
            {"base_fingerprint": "0" * 64},
            r"the base model of this worker is [0-9a-f]{12}, the targets are of 000000000000",
        ),
        ({"tokenizer_sha256": "0" * 64}, "the tokenizer in .* is another one for this worker"),
    ):
        other = replace(job, header=job.header.model_copy(update=change))
        with pytest.raises(ModelError, match=message):
            precompute(other, tmp_path / "targets", config.resources)
    assert not list((tmp_path / "targets").glob("*.parquet"))


def test_starting_over_takes_up_no_shard(micro_config, tmp_path) -> None:
    config = micro_config(tmp_path / "run")
    layout = RunLayout(config.run.directory)
    precompute_here(config, layout.targets)
    forget(Run(config), "precompute")
    assert not layout.targets.exists()
