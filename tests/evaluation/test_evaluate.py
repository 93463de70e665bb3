"""Evaluation of the micro model: a whole pass on Ray, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nexus_ray.checkpoints.overlay import load_overlay, load_overlay_config, save_overlay
from nexus_ray.config import Config
from nexus_ray.data.documents import read_documents
from nexus_ray.data.packing import pack_shard
from nexus_ray.data.sources import Shard, list_shards
from nexus_ray.errors import ArtefactError, ConfigError, DataError
from nexus_ray.evaluation.evaluate import evaluate, merge
from nexus_ray.evaluation.routers import PairedRouters
from nexus_ray.evaluation.scorer import PairedScorer
from nexus_ray.evaluation.work import first_halves, plan_scoring, unit_limits
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import load_student
from nexus_ray.router.accumulate import moments_of_logits
from nexus_ray.router.moments import RouterMoments


def install_overlay(micro_overlay: Path, layout: RunLayout, *, zero: bool) -> None:
    """The random overlay, or one whose shared experts put out exactly nothing."""
    description = load_overlay_config(micro_overlay)
    tensors = load_overlay(micro_overlay, description.base_fingerprint)[1]
    if zero:
        tensors = {name: torch.zeros_like(t) if "down_proj" in name else t for name, t in tensors.items()}
    save_overlay(layout.overlay, description, tensors)


def run_in_process(config: Config, layout: RunLayout) -> dict[str, Any]:
    """What `evaluate` does, without Ray."""
    scorer = PairedScorer(config, layout.overlay)
    shards, items = plan_scoring(config)
    return merge(shards, [scorer(item) for item in reversed(items)], config).sources


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_zero_overlay_has_a_ratio_of_exactly_one(
    micro_config: Callable[..., Config], micro_overlay: Path, tmp_path: Path
):
    config = micro_config(tmp_path / "run", **{"data.shard_bytes": 1024})
    layout = RunLayout(config.run.directory)
    install_overlay(micro_overlay, layout, zero=True)
    results = evaluate(config, layout).sources
    assert {name: result["role"] for name, result in results.items()} == {"play": "domain", "prose": "retention"}
    for result in results.values():
        assert result["ratio"] == {"value": 1.0, "confidence_interval": [1.0, 1.0]}
        assert result["base"] == result["student"]
        assert result["router_drift"]["kl"] == [0.0, 0.0]
        assert result["router_drift"]["top_k_overlap"] == [1.0, 1.0]
        assert result["router_change"]["usage_distance"] == [0.0, 0.0]
        assert result["router_change"]["covariance_distance"] == [0.0, 0.0]
        assert min(result["router_change"]["halves_distance"]) > 0
    assert results == run_in_process(config, layout)


def test_both_models_are_scored_on_all_held_out_text(
    micro_config: Callable[..., Config], micro_overlay: Path, tmp_path: Path
):
    config = micro_config(tmp_path / "run")
    layout = RunLayout(config.run.directory)
    install_overlay(micro_overlay, layout, zero=False)
    result = run_in_process(config, layout)["play"]
    student = load_student(config.model, layout.overlay)
    shards = list_shards(config.data, "heldout", ("play",))
    sequences = [s for shard in shards for s in pack_shard(shard, student.tokenizer, config.data.sequence_length)]
    nats = {"base": 0.0, "student": 0.0}
    routed: dict[str, list[torch.Tensor]] = {"base": [], "student": []}
    for sequence in sequences:
        ids = torch.from_numpy(sequence.input_ids[: sequence.num_tokens]).long()[None]
        valid = torch.ones_like(ids, dtype=torch.bool)
        with torch.no_grad():
            routed["student"].append(student.forward(ids, valid)[1][0])
            with student.base():
                routed["base"].append(student.forward(ids, valid)[1][0])
            nats["student"] += student.model(input_ids=ids, labels=ids).loss.item() * (sequence.num_tokens - 1)
            with student.base():
                nats["base"] += student.model(input_ids=ids, labels=ids).loss.item() * (sequence.num_tokens - 1)
    tokens = sum(sequence.num_tokens - 1 for sequence in sequences)
    assert (result["units"], result["tokens"]) == (len(sequences), tokens)
    assert result["bytes"] == sum(len(text.encode()) for text in held_out_texts(config, "play"))
    for model, total in nats.items():
        assert result[model]["token_perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
        assert result[model]["bits_per_byte"] == pytest.approx(total / math.log(2) / result["bytes"], rel=1e-4)
    assert result["ratio"]["value"] == pytest.approx(math.exp((nats["student"] - nats["base"]) / tokens), rel=1e-4)
    assert min(result["router_drift"]["kl"][1:]) > 0
    probabilities = {name: torch.cat(rows).double().softmax(-1).mean(0) for name, rows in routed.items()}
    distance = (probabilities["base"] - probabilities["student"]).abs().sum(-1) / 2
    assert result["router_change"]["probability_distance"] == pytest.approx(distance.tolist(), rel=1e-3, abs=1e-7)
    assert result["router_change"]["usage_distance"][1] > 0


def held_out_texts(config: Config, source: str) -> list[str]:
    return [d.text or "" for shard in list_shards(config.data, "heldout", (source,)) for d in read_documents(shard)]


def test_rows_that_cannot_be_read_are_left_out_and_counted_in_the_result(
    micro_config: Callable[..., Config], micro_overlay: Path, micro_texts: Path, tmp_path: Path, caplog
):
    lines = (micro_texts / "play.heldout.jsonl").read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([lines[0], "no json", *lines[1:], '{"title": "no text"}']) + "\n")
    whole = micro_config(tmp_path / "run", **{"data.shard_bytes": 1024})
    install_overlay(micro_overlay, RunLayout(whole.run.directory), zero=False)
    config = micro_config(tmp_path / "run", **{"data.sources.play.heldout": str(broken), "data.shard_bytes": 1 << 20})
    result = run_in_process(config, RunLayout(config.run.directory))
    assert (result["play"]["unreadable_rows"], result["prose"]["unreadable_rows"]) == (2, 0)
    assert result["play"]["bytes"] == run_in_process(whole, RunLayout(whole.run.directory))["play"]["bytes"]
    [warning] = [record.message for record in caplog.records if "cannot be read" in record.message]
    assert f"data.sources.play.heldout: 2 rows cannot be read and are left out; the first: {broken}, byte" in warning


def test_a_strict_evaluation_fails_at_the_first_row_that_cannot_be_read(
    micro_config: Callable[..., Config], micro_overlay: Path, tmp_path: Path
):
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\nno json\n')
    overrides = {"data.sources.play.heldout": f"{tmp_path}/broken.jsonl", "data.strict": True}
    config = micro_config(tmp_path / "run", **overrides)
    install_overlay(micro_overlay, RunLayout(config.run.directory), zero=True)
    with pytest.raises(DataError, match=r"broken\.jsonl, byte 17: not a JSON line"):
        run_in_process(config, RunLayout(config.run.directory))


def test_held_out_text_without_a_readable_row_is_refused(
    micro_config: Callable[..., Config], micro_overlay: Path, tmp_path: Path
):
    (tmp_path / "broken.jsonl").write_text("no json\n" * 3)
    config = micro_config(tmp_path / "run", **{"data.sources.play.heldout": f"{tmp_path}/broken.jsonl"})
    install_overlay(micro_overlay, RunLayout(config.run.directory), zero=True)
    with pytest.raises(DataError, match=r"play\.heldout: no row can be read; the first of 3: .*byte 0"):
        run_in_process(config, RunLayout(config.run.directory))


def test_a_limit_is_kept_exactly_and_spread_over_the_shards():
    shards = [Shard(i, "a" if i < 4 else "b", "x.jsonl", 0, 1) for i in range(7)]
    assert unit_limits(shards, None) == [None] * 7
    for limit in (2, 3, 10, 101):
        limits = unit_limits(shards, limit)
        for part in (limits[:4], limits[4:]):
            assert sum(n or 0 for n in part) == limit
            assert max(n or 0 for n in part) - min(n or 0 for n in part) <= 1


def test_the_limit_is_what_is_scored(micro_config: Callable[..., Config], micro_overlay: Path, tmp_path: Path):
    config = micro_config(tmp_path / "run", **{"evaluate.max_sequences_per_source": 3})
    layout = RunLayout(config.run.directory)
    install_overlay(micro_overlay, layout, zero=False)
    assert {result["units"] for result in run_in_process(config, layout).values()} == {3}


def moments_by_source(config: Config, overlay: Path) -> dict[str, list[RouterMoments]]:
    """The moments of the base that each shard's scorer returns."""
    scorer = PairedScorer(config, overlay)
    found: dict[str, list[RouterMoments]] = {}
    for item in plan_scoring(config)[1]:
        found.setdefault(item["source"], []).append(RouterMoments.from_bytes(scorer(item)["base_moments"]))
    return found


def test_halves_of_a_single_shard_do_not_depend_on_the_batch_size(
    micro_config: Callable[..., Config], micro_overlay: Path, tmp_path: Path
):
    results, counts = [], []
    for size in (1, 3, 4):
        config = micro_config(tmp_path / "run", **{"evaluate.batch_sequences": size})
        layout = RunLayout(config.run.directory)
        install_overlay(micro_overlay, layout, zero=True)
        [moments] = moments_by_source(config, layout.overlay)["play"]
        counts.append(moments.count.tolist())
        results.append(run_in_process(config, layout)["play"]["router_change"]["halves_distance"])
    assert counts == [counts[0]] * 3
    assert abs(counts[0][0] - counts[0][1]) <= 64
    for result in results[1:]:
        assert result == pytest.approx(results[0], abs=1e-9)


def test_halves_of_uneven_shards_are_of_about_one_size(
    micro_config: Callable[..., Config], micro_overlay: Path, micro_texts: Path, tmp_path: Path
):
    lines = (micro_texts / "prose.heldout.jsonl").read_text().splitlines()
    (tmp_path / "large.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "small.jsonl").write_text(json.dumps({"text": "the people shall report"}) + "\n")
    patterns = [f"{tmp_path}/large.jsonl", f"{tmp_path}/small.jsonl"]
    overrides = {"data.sources.play.heldout": patterns, "data.shard_bytes": 1 << 20}
    config = micro_config(tmp_path / "run", **overrides)
    layout = RunLayout(config.run.directory)
    install_overlay(micro_overlay, layout, zero=True)
    shards = moments_by_source(config, layout.overlay)["play"]
    assert len(shards) == 2
    first, second = sum(moments.count for moments in shards)
    assert abs(first - second) <= 2 * 64


def test_whole_shards_make_the_halves_where_they_balance():
    shards = [Shard(i, "ab"[i % 2], f"{i}.jsonl", 0, size) for i, size in enumerate([900, 500, 800, 500, 100])]
    assert first_halves(shards, [None] * 5, 64) == [1, 1, 0, 0, 0]
    assert first_halves(shards, [1] * 5, 64)[1::2] == [1, 0]


def test_a_diverged_student_is_named_with_the_text_and_what_to_do(
    micro_config: Callable[..., Config], micro_overlay: Path, tmp_path: Path
):
    config = micro_config(tmp_path / "run")
    layout = RunLayout(config.run.directory)
    description = load_overlay_config(micro_overlay)
    tensors = load_overlay(micro_overlay, description.base_fingerprint)[1]
    broken = {name: t * 1e38 if "layers.0.down_proj.weight" in name else t for name, t in tensors.items()}
    save_overlay(layout.overlay, description, broken)
    with pytest.raises(ArtefactError, match=r"the trained overlay diverged: the student's router logits") as caught:
        run_in_process(config, layout)
    assert "layer 1 are NaN or infinite in sequence 0 of " in caught.value.message
    assert "prose.heldout.jsonl, 0 to " in caught.value.message
    assert caught.value.hint == "train again with a lower train.optimiser.learning_rate"


def test_a_base_that_gives_nan_is_not_blamed_on_the_student():
    logits = torch.rand(2, 4, 1, 4)
    logits[1, 2] = math.nan
    half = np.arange(2)
    with pytest.raises(DataError, match=r"layer 0 are NaN or infinite in sequence 7 of a\.jsonl, token 2") as caught:
        PairedRouters.of(logits, logits, np.ones((2, 4), bool), half, 2, ["6 of a.jsonl", "7 of a.jsonl"])
    assert "base model" in (caught.value.hint or "")


def test_without_a_trained_overlay_nothing_starts(micro_config: Callable[..., Config], tmp_path: Path):
    config = micro_config(tmp_path / "run")
    with pytest.raises(ArtefactError, match="no trained overlay"):
        evaluate(config, RunLayout(config.run.directory))


def test_no_held_out_text_at_all_is_a_configuration_error(
    micro_config: Callable[..., Config], micro_overlay: Path, tmp_path: Path
):
    config = micro_config(tmp_path / "run", **{f"data.sources.{n}.heldout": [] for n in ("play", "prose")})
    layout = RunLayout(config.run.directory)
    install_overlay(micro_overlay, layout, zero=True)
    with pytest.raises(ConfigError, match="no source has held-out text"):
        evaluate(config, layout)


SOME_MOMENTS = moments_of_logits(torch.rand(2, 4, 1, 4), np.ones((2, 4), bool), np.arange(2), 2).to_bytes()


def row_of(shard: int, nats: list[float], num_bytes: int = 9) -> dict[str, Any]:
    """What an actor returns for a shard whose sequences have ten targets each."""
    return {
        "shard": shard,
        "base_nats": nats,
        "student_nats": nats,
        "targets": [10] * len(nats),
        "num_bytes": [num_bytes] * len(nats),
        "words": [2] * len(nats),
        "wordless": 0,
        "samples": "[]",
        "drift_tokens": 11 * len(nats),
        "kl": [0.0],
        "l1": [0.0],
        "top_k_overlap": [0.0],
        "unreadable": 0,
        "unreadable_example": "",
        "base_moments": SOME_MOMENTS,
        "student_moments": SOME_MOMENTS,
    }


def test_sequences_in_which_nothing_is_predicted_say_nothing(micro_config: Callable[..., Config], tmp_path: Path):
    config = micro_config(tmp_path)
    shards = [Shard(0, "play", "x.jsonl", 0, 1)]
    with_silence = row_of(0, [30.0, 0.0, 20.0, 0.0]) | {
        "targets": [10, 0, 10, 0],
        "num_bytes": [9, 0, 9, 0],
        "words": [2, 0, 2, 0],
    }
    [found, expected] = (
        merge(shards, [row], config).sources["play"] for row in (with_silence, row_of(0, [30.0, 20.0]))
    )
    for name in ("units", "tokens", "bytes", "base", "student", "ratio"):
        assert found[name] == expected[name]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([row_of(0, [30.0]), row_of(1, [])], DataError, r"data\.sources\.play\.heldout makes 1 sequences"),
        ([row_of(0, []), row_of(1, [])], DataError, "makes 0 sequences"),
        ([row_of(0, [30.0]), row_of(1, [30.0], num_bytes=0)], None, ""),
        ([row_of(0, [30.0, 30.0], num_bytes=0)], DataError, "with text"),
        ([row_of(0, [30.0, math.nan])], ArtefactError, "play"),
        ([row_of(0, [30.0, 1e9])], ArtefactError, "nats per token"),
    ],
)
def test_text_that_supports_no_interval_is_refused(
    micro_config: Callable[..., Config],
    tmp_path: Path,
    rows: list[dict[str, Any]],
    error: type[Exception] | None,
    message: str,
):
    shards = [Shard(row["shard"], "play", "x.jsonl", 0, 1) for row in rows]
    given = [dict(row) for row in rows]
    if error is None:
        assert np.isfinite(merge(shards, given, micro_config(tmp_path)).sources["play"]["ratio"]["value"])
        return
    with pytest.raises(error, match=message):
        merge(shards, given, micro_config(tmp_path))
