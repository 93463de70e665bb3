"""Target sets of conversations of which only the assistant's part is predicted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from precompute_here import manifest_of, precompute_here, rows_of, run_workers_here
from transformers import AutoTokenizer

from nexus_ray.config import Config
from nexus_ray.errors import DataError
from nexus_ray.pipeline import Run
from nexus_ray.stages import BY_NAME
from nexus_ray.targets.reading.reader import TargetSet
from nexus_ray.targets.writing.job import job_of_run
from nexus_ray.targets.writing.shard_keys import plan_work

ANSWER = "The king is silent, and the night is his servant. "
OUTPUTS = [{"targets.mode": "topk"}, {"targets.mode": "sampled"}, {"targets.mode": "hidden"}]
OUTPUTS += [{"targets.mode": "hidden", "targets.hidden_dtype": "float8"}]


@pytest.fixture(autouse=True)
def _workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    run_workers_here(monkeypatch)


@pytest.fixture
def make_config(micro_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """A function (settings) -> configuration whose source prose is chat: long questions, some with long answers."""
    rows = [
        {"prompt": "Who? " * 200, "response": ANSWER * 20},
        {"messages": [{"role": "user", "content": "What? " * 300}]},
        {"prompt": "When?", "response": ANSWER},
    ]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**settings: object) -> Config:
        prose = {"data.sources.prose.train": str(chat), "data.sources.prose.predict": "assistant"}
        return micro_config(tmp_path / "run", **(prose | settings))

    return make


@pytest.mark.parametrize("settings", OUTPUTS, ids=lambda settings: "-".join(settings.values()))
def test_targets_are_those_of_all_tokens_where_the_assistant_wrote(make_config, tmp_path, settings) -> None:
    routers = {"train.sources.prose.router_kl": 1.0}
    rows = {}
    for predict in ("all", "assistant"):
        precompute_here(
            make_config(**settings, **routers, **{"data.sources.prose.predict": predict}), tmp_path / predict
        )
        rows[predict] = rows_of(tmp_path / predict, "prose")
    encoding = manifest_of(tmp_path / "all").output
    assert min(row["num_targets"] for row in rows["assistant"]) == 0, "a sequence of questions alone is among them"
    compared = 0
    for everything, some in zip(rows["all"], rows["assistant"], strict=True):
        mask = np.asarray(some["loss_mask"])
        assert some["input_ids"] == everything["input_ids"]
        assert some["router_logits"] == everything["router_logits"], "routers have no loss mask"
        assert (len(mask), mask.sum(), mask[0]) == (some["num_tokens"], some["num_targets"], False)
        assert sum(everything["loss_mask"]) == everything["num_tokens"] - 1
        if settings["targets.mode"] == "sampled":  # other positions, other offsets: only the number can be compared
            assert len(some["draws"]) == mask.sum() * encoding.widths()["draws"]
            continue
        for name, width in encoding.widths().items():
            stored = np.frombuffer(everything[name], np.uint8).reshape(-1, width)
            assert some[name] == stored[mask[1:]].tobytes()
        compared += int(mask.sum())
    assert compared > 100 or settings["targets.mode"] == "sampled"


@pytest.mark.parametrize("settings", OUTPUTS, ids=lambda settings: "-".join(settings.values()))
def test_sequences_without_a_target_are_read_like_any_other(make_config, tmp_path, settings) -> None:
    precompute_here(make_config(**settings), tmp_path / "targets")
    targets = TargetSet.open(tmp_path / "targets")
    numbers = targets.sequences("prose")
    counts = targets.num_targets(numbers)
    empty = numbers[counts == 0]
    assert len(empty)
    assert counts.sum() == sum(file.targets for file in targets.manifest.files if file.source == "prose")
    for chosen in (numbers, empty[:1]):
        batch = targets.read(chosen)
        assert int(batch.loss_mask.sum()) == targets.num_targets(chosen).sum()
        assert batch.output is not None
        said = next(value for value in vars(batch.output).values() if isinstance(value, torch.Tensor))
        assert len(said) == targets.num_targets(chosen).sum()


def test_what_is_predicted_is_what_the_assistant_said(make_config, tmp_path, tokenizer_directory) -> None:
    precompute_here(make_config(), tmp_path / "targets")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    rows = rows_of(tmp_path / "targets", "prose")
    predicted = [
        token for row in rows for token, counts in zip(row["input_ids"], row["loss_mask"], strict=True) if counts
    ]
    one, other = (f"<|channel|>final<|message|>{ANSWER * times}<|return|>" for times in (20, 1))
    assert tokenizer.decode(predicted) == one + other


def test_a_source_that_the_assistant_has_no_part_in_is_refused(make_config, tmp_path) -> None:
    silent = tmp_path / "silent.jsonl"
    silent.write_text(json.dumps({"messages": [{"role": "user", "content": "What? " * 300}]}) + "\n")
    config = make_config(**{"data.sources.prose.train": str(silent)})
    with pytest.raises(DataError, match=r"data\.sources\.prose\.train holds no message of an assistant") as error:
        precompute_here(config, tmp_path / "targets")
    assert "data.sources.prose.predict=all" in error.value.hint


def test_the_choice_names_other_shards_and_the_default_the_same_as_ever(make_config) -> None:
    def names(config: Config) -> dict[str, str]:
        return {item.shard.source: item.name for item in plan_work(job_of_run(config), config.resources)}

    some, everything = names(make_config()), names(make_config(**{"data.sources.prose.predict": "all"}))
    assert some["prose"] != everything["prose"]
    assert some["play"] == everything["play"]


@pytest.mark.parametrize(
    ("settings", "stage"),
    [({"data.sources.prose.predict": "assistant"}, "precompute"), ({"model.attention": "document"}, "precompute")],
)
def test_recipes_hold_only_what_is_not_the_default(micro_config, tmp_path, settings, stage) -> None:
    default, other = (BY_NAME[stage].sections(Run(micro_config(tmp_path / "run", **more))) for more in ({}, settings))
    assert set(default["data"]) == {"sequence_length", "shard_bytes", "text"}
    assert set(default["model"]) == {"device", "dtype", "experts"}
    assert default != other


def test_held_out_text_alone_makes_only_the_evaluation_stale(micro_config, tmp_path) -> None:
    only_play = {"train.sources": {"play": {"sequences_per_step": 1, "cross_entropy": 1.0}}}
    runs = [
        Run(micro_config(tmp_path / "run", **only_play, **{"data.sources.prose.predict": predict}))
        for predict in ("all", "assistant")
    ]
    stale = {stage for stage in BY_NAME if runs[0].recipe(stage) != runs[1].recipe(stage)}
    assert stale == {"evaluate"}
