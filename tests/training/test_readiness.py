"""Targets that a training cannot use are refused before it starts, with what to do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from nexus_ray.checkpoints.overlay import OverlayConfig, load_overlay_config
from nexus_ray.config import Config
from nexus_ray.errors import ArtefactError, ConfigError, DataError
from nexus_ray.targets.encoding.encodings import HiddenEncoding, SampledEncoding
from nexus_ray.targets.encoding.routers import RouterEncoding
from nexus_ray.targets.encoding.top_k import TopKEncoding
from nexus_ray.targets.format import Manifest, TargetFile
from nexus_ray.training.readiness import check_targets, report_epochs

SOURCES = {
    "play": {"sequences_per_step": 4, "cross_entropy": 1.0},
    "prose": {"sequences_per_step": 4, "output_kl": 2.0, "router_kl": 1.0},
}
TOP_K = TopKEncoding(k=16, vocabulary=4117)
SIZES = {"layers": (0, 1), "every": 1, "experts": 8, "experts_per_token": 2}
LOGITS = RouterEncoding(mode="logits", **SIZES)


def file(source: str, sequences: int, *, output: bool, router: bool) -> TargetFile:
    numbers = {"sequences": sequences, "tokens": 64 * sequences, "targets": 63 * sequences, "bytes": 1}
    digests = {"sha256": "", "blocks": "", "text": "", "name": f"{source}-{sequences}.parquet"}
    return TargetFile(source=source, output=output, router=router, **numbers, **digests)


@pytest.fixture
def overlay(micro_overlay: Path) -> OverlayConfig:
    return load_overlay_config(micro_overlay)


@pytest.fixture
def manifest(overlay: OverlayConfig) -> Callable[..., Manifest]:
    """A function (**changes) -> Manifest of 8 + 4 sequences of each source, made in two shards each."""
    files = [file("play", count, output=False, router=False) for count in (8, 4)]
    files += [file("prose", count, output=True, router=True) for count in (8, 4)]
    facts = {"compute": None, "tokenizer_sha256": "", "vocabulary": 4117, "sequence_length": 64, "separator": 0}
    facts |= {"base_fingerprint": overlay.base_fingerprint, "tokenizer": "", "files": tuple(files)}
    return lambda **changes: Manifest(**(facts | {"output": TOP_K, "router": LOGITS} | changes))


@pytest.fixture
def config(make_micro_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    return lambda **overrides: make_micro_config(tmp_path, **({"train.sources": SOURCES} | overrides))


def test_targets_with_everything_are_accepted(manifest, config, overlay):
    check_targets(manifest(), config(), overlay)


def test_another_base_is_refused(manifest, config, overlay):
    with pytest.raises(ArtefactError, match="another base model than the overlay"):
        check_targets(manifest(base_fingerprint="0" * 64), config(), overlay)


def test_too_few_sequences_are_refused_with_both_numbers(manifest, config, overlay):
    with pytest.raises(DataError, match="source play has 12 sequences; validation and one step need 13"):
        check_targets(manifest(), config(**{"train.validation_sequences": 9}), overlay)


def test_a_source_without_sequences_is_refused(manifest, config, overlay):
    alone = [made for made in manifest().files if made.source == "play"]
    with pytest.raises(DataError, match="source prose has 0 sequences"):
        check_targets(manifest(files=tuple(alone)), config(), overlay)


@pytest.mark.parametrize(("kind", "term"), [("output", "output_kl"), ("router", "router_kl")])
def test_a_shard_without_the_targets_of_a_loss_is_refused(manifest, config, overlay, kind, term):
    files = list(manifest().files)
    files[-1] = files[-1].model_copy(update={kind: False})
    with pytest.raises(ArtefactError, match=f"no {kind} targets of source prose, which has {term}"):
        check_targets(manifest(files=tuple(files)), config(), overlay)
    check_targets(manifest(files=tuple(files)), config(**{"train.mode": "online"}), overlay)


@pytest.mark.parametrize("output", [TOP_K, SampledEncoding(draws=4, vocabulary=4117)], ids=["topk", "sampled"])
def test_output_targets_of_another_temperature_are_refused_with_both_numbers(manifest, config, overlay, output):
    warm = config(**{"train.output_temperature": 2.5})
    with pytest.raises(ArtefactError, match=r"temperature 1, but train\.output_temperature is 2\.5") as raised:
        check_targets(manifest(output=output), warm, overlay)
    assert "nexus-ray precompute CONFIG" in str(raised.value)
    check_targets(manifest(output=output.model_copy(update={"temperature": 2.5})), warm, overlay)


def test_hidden_states_serve_every_temperature(manifest, config, overlay):
    check_targets(manifest(output=HiddenEncoding(hidden_size=64)), config(**{"train.output_temperature": 2.5}), overlay)


def test_selected_routers_of_another_temperature_are_refused_and_all_logits_are_not(manifest, config, overlay):
    warm = config(**{"train.router_temperature": 2.0})
    selected = RouterEncoding(mode="selected", temperature=4.0, **SIZES)
    with pytest.raises(ArtefactError, match=r"temperature 4, but train\.router_temperature is 2"):
        check_targets(manifest(router=selected), warm, overlay)
    check_targets(manifest(router=LOGITS), warm, overlay)


def test_a_temperature_that_changes_is_refused_with_targets_made_for_one(manifest, config, overlay):
    """The configuration asks for hidden states; the targets in the run are still those of before."""
    changes = {"targets.mode": "hidden", "train.output_temperature": [[0, 2], [1, 1]]}
    said = r"temperature 1, but train\.output_temperature is \[\[0\.0, 2\.0\], \[1\.0, 1\.0\]\]"
    with pytest.raises(ArtefactError, match=said):
        check_targets(manifest(), config(**changes), overlay)
    check_targets(manifest(output=HiddenEncoding(hidden_size=64)), config(**changes), overlay)
    routers = {"train.router_temperature": [[0.3, 8], [1, 4]]}
    check_targets(manifest(), config(**routers), overlay)
    with pytest.raises(ArtefactError, match=r"temperature 4, but train\.router_temperature is \[\[0\.3, 8\.0\], "):
        check_targets(
            manifest(router=RouterEncoding(mode="selected", temperature=4.0, **SIZES)), config(**routers), overlay
        )


@pytest.mark.parametrize("output", [TOP_K, SampledEncoding(draws=4, vocabulary=4117)], ids=["topk", "sampled"])
def test_hidden_states_are_matched_with_hidden_states_only(manifest, config, overlay, output):
    sources = SOURCES | {"prose": {"sequences_per_step": 4, "hidden_mse": 1.0}}
    matching = config(**{"train.sources": sources, "targets.mode": "hidden", "train.output_temperature": 3.0})
    with pytest.raises(ArtefactError, match="no hidden states, which prose needs for its hidden_mse") as raised:
        check_targets(manifest(output=output), matching, overlay)
    assert "nexus-ray precompute CONFIG" in str(raised.value)
    check_targets(manifest(output=HiddenEncoding(hidden_size=64)), matching, overlay)


def test_a_step_in_tokens_counts_as_its_sequences(manifest, config, overlay):
    """12 sequences of 64 tokens, 4 of them for validation: a step of 8 is there, one of 9 is not."""
    sources = {"play": {"tokens_per_step": 512, "cross_entropy": 1.0}}
    check_targets(manifest(), config(**{"train.sources": sources}), overlay)
    sources["play"]["tokens_per_step"] += 1
    with pytest.raises(DataError, match="source play has 12 sequences; validation and one step need 13"):
        check_targets(manifest(), config(**{"train.sources": sources}), overlay)


def test_targets_that_no_loss_needs_may_be_of_any_temperature(manifest, config, overlay):
    plain = {name: {"sequences_per_step": 4, "cross_entropy": 1.0} for name in SOURCES}
    check_targets(manifest(), config(**{"train.sources": plain, "train.output_temperature": 2.0}), overlay)


def test_more_workers_than_sequences_in_a_step_are_refused(manifest, config, overlay):
    with pytest.raises(ConfigError, match=r"a step has 8 sequences, fewer than resources\.workers=9"):
        check_targets(manifest(), config(**{"resources.workers": 9}), overlay)


def test_how_often_text_is_read_is_said_when_it_is_more_than_once(manifest, config, caplog):
    """12 sequences less 4 of validation, 4 in each step."""
    with caplog.at_level(logging.INFO):
        report_epochs(manifest(), config(**{"train.steps": 2}))
        assert not caplog.messages
        report_epochs(manifest(), config(**{"train.steps": 5}))
    assert caplog.messages == [
        f"source {name}: 8 sequences are read 2.50 times in 5 steps; add text to read more of it" for name in SOURCES
    ]
