"""The configuration: what is refused, what the message says, and where each value came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nexus_ray.config import (
    Config,
    PretrainRun,
    flatten,
    load_config,
    resolve_config,
    save_config,
)
from nexus_ray.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
MINIMAL = """
run: {directory: runs/x}
model: {path: models/base}
data:
  sources:
    play: {train: play.jsonl}
    prose: {train: [a.txt, b.txt], role: retention}
train:
  sources:
    play: {sequences_per_step: 4, cross_entropy: 1.0}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def changed(path: Path, **sections: object) -> Path:
    """The minimal file with whole sections replaced, or removed with None."""
    values = yaml.safe_load(path.read_text()) | sections
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_minimal_file_is_enough(minimal):
    config = load_config(minimal)
    assert config.run.directory == Path("runs/x")
    assert config.data.sources["play"].train == ("play.jsonl",)
    assert config.data.sources["prose"].train == ("a.txt", "b.txt")
    assert config.train.sources["play"].sequences_per_step == 4


def test_values_cannot_be_changed_after_loading(minimal):
    config = load_config(minimal)
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3


class TestUnknownFields:
    @pytest.mark.parametrize(
        ("wrong", "right"),
        [
            ("trian.steps=3", "train"),
            ("train.stepz=3", "steps"),
            ("train.optimiser.learning_rat=1", "learning_rate"),
            ("train.optimiser.schedule.warmpu=0.1", "warmup"),
            ("data.sources.play.trian=x", "train"),
            ("train.sources.play.output_k=1", "output_kl"),
        ],
    )
    def test_the_nearest_name_is_suggested(self, minimal, wrong, right):
        message = refusal(minimal, wrong)
        assert "unknown field" in message
        assert f"did you mean '{right}'?" in message

    def test_without_a_near_name_all_are_listed(self, minimal):
        message = refusal(minimal, "run.qqqqqq=1")
        assert "known: directory, seed" in message

    def test_several_mistakes_are_told_at_once(self, minimal):
        message = refusal(minimal, "train.stepz=3", "collect.batch_sequences=many")
        assert "train.stepz" in message
        assert "collect.batch_sequences" in message


class TestOverrides:
    def test_an_override_wins_and_creates_missing_sections(self, minimal):
        config = load_config(minimal, ["run.seed=7", "train.optimiser.schedule.shape=linear"])
        assert config.run.seed == 7
        assert config.train.optimiser.schedule.shape == "linear"

    def test_values_are_yaml(self, minimal):
        config = load_config(
            minimal,
            ["train.optimiser.learning_rate=3e-4", "select.sources=[play]", "data.sources.play.train=[a, b]"],
        )
        assert config.train.optimiser.learning_rate == 3e-4
        assert config.select.sources == ("play",)
        assert config.data.sources["play"].train == ("a", "b")

    def test_an_equals_sign_may_stand_in_the_value(self, minimal):
        assert load_config(minimal, ["model.path=models/a=b"]).model.path == Path("models/a=b")

    def test_a_whole_section_may_be_given(self, minimal):
        assert load_config(minimal, ["resources={workers: 3}"]).resources.workers == 3

    @pytest.mark.parametrize("override", ["train.steps", "=3", "", "--verbose"])
    def test_what_is_no_assignment_is_refused(self, minimal, override):
        assert "section.field=value" in refusal(minimal, override)

    def test_a_value_that_is_no_yaml_is_refused(self, minimal):
        assert "train.steps=[1" in refusal(minimal, "train.steps=[1")

    def test_a_path_through_a_value_is_refused(self, minimal):
        assert "'directory' is a value, not a section" in refusal(minimal, "run.directory.name=x")


class TestOrigins:
    def test_every_field_has_one(self, minimal):
        resolved = resolve_config(minimal, ["run.seed=7"], Config)
        assert resolved.origins.keys() == flatten(resolved.config).keys()
        assert resolved.origins["run.seed"] == "override run.seed=7"
        assert resolved.origins["run.directory"] == str(minimal)
        assert resolved.origins["data.sources.prose.role"] == str(minimal)
        assert resolved.origins["data.sources.play.role"] == "default"
        assert resolved.origins["train.steps"] == "default"

    def test_the_last_override_of_a_field_is_named(self, minimal):
        resolved = resolve_config(minimal, ["run.seed=7", "run.seed=8"], Config)
        assert resolved.origins["run.seed"] == "override run.seed=8"

    def test_an_override_of_a_section_is_the_origin_of_its_fields(self, minimal):
        resolved = resolve_config(minimal, ["resources={workers: 3}"], Config)
        assert resolved.origins["resources.workers"] == "override resources={workers: 3}"
        assert resolved.origins["resources.cpus_per_worker"] == "default"


class TestValues:
    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("train.steps=many", "train.steps: Input should be a valid integer"),
            ("train.steps=0", "train.steps: Input should be greater than or equal to 1"),
            ("train.mode=sideways", "train.mode: Input should be 'offline' or 'online'"),
            (
                "train.optimiser.learning_rate=.inf",
                "learning_rate: Input should be a finite number",
            ),
            ("train.optimiser.learning_rate=.nan", "learning_rate: Input should be a finite number"),
            ("data.sources.play.train=3", "data.sources.play.train"),
        ],
    )
    def test_a_wrong_value_is_named_with_what_was_found(self, minimal, override, said):
        message = refusal(minimal, override)
        assert said in message
        assert "found" in message

    @pytest.mark.parametrize("section", ["run", "model", "data", "train"])
    def test_a_missing_section_is_named(self, minimal, section):
        assert f"{section} is required" in refusal(changed(minimal, **{section: None}))

    def test_a_missing_field_is_named(self, minimal):
        assert "model.path is required" in refusal(changed(minimal, model={}))


class TestCrossFieldChecks:
    def test_a_trained_source_must_exist(self, minimal):
        message = refusal(minimal, "train.sources.pley={sequences_per_step: 1, cross_entropy: 1}")
        assert "train.sources: there is no source 'pley' in data.sources; did you mean 'play'?" in message

    def test_a_trained_source_must_have_a_loss(self, minimal):
        message = refusal(minimal, "train.sources.play={sequences_per_step: 1}")
        assert "train.sources.play: it has no loss: give it cross_entropy" in message

    def test_a_selected_source_must_exist(self, minimal):
        assert "select.sources: there is no source 'verse'" in refusal(minimal, "select.sources=[verse]")

    def test_there_must_be_a_domain_source(self, minimal):
        assert "role: domain" in refusal(minimal, "data.sources.play.role=retention")

    def test_there_must_be_a_source(self, minimal):
        assert "data.sources" in refusal(minimal, "data.sources={}")

    def test_warmup_and_decay_must_fit_the_run(self, minimal):
        message = refusal(minimal, "train.optimiser.schedule.warmup=0.6")
        assert "train.optimiser.schedule: warmup + decay must be at most 1" in message


class TestFiles:
    def test_save_and_load_give_the_same_configuration(self, minimal, tmp_path):
        config = load_config(minimal, ["train.optimiser.learning_rate=1e-5", "resources.memory_gib_per_worker=2.5"])
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config

    def test_no_file(self, tmp_path):
        assert "no configuration file" in refusal(tmp_path / "missing.yaml")

    def test_a_directory(self, tmp_path):
        assert f"cannot read {tmp_path}" in refusal(tmp_path)

    @pytest.mark.parametrize("text", ["run: {directory: x", "a: b: c", "\t- x"])
    def test_not_yaml(self, minimal, text):
        minimal.write_text(text)
        assert "not valid YAML" in refusal(minimal)

    def test_not_text(self, minimal):
        minimal.write_bytes(b"\xff\xfe\x00run")
        assert f"cannot read {minimal}" in refusal(minimal)

    @pytest.mark.parametrize("text", ["", "- a list", "just words"])
    def test_not_sections(self, minimal, text):
        minimal.write_text(text)
        assert "must hold sections" in refusal(minimal)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_of_the_project_is_valid(path):
    is_pretraining = "pretrain" in yaml.safe_load(path.read_text(encoding="utf-8"))
    resolve_config(path, [], PretrainRun if is_pretraining else Config)
