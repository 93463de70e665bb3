"""The command line: exit codes, messages, and verbs that need no Ray."""

import json
from pathlib import Path

import pytest
import yaml

from nexus_ray.cli import run_command
from nexus_ray.config import Config, save_config


@pytest.fixture
def config_file(make_micro_config, tmp_path: Path) -> Path:
    config: Config = make_micro_config(tmp_path / "run")
    save_config(config, tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "verb",
    [
        "run",
        "collect",
        "train",
        "serve",
        "chat",
        "config",
        "plot",
        "pretrain",
        "export",
        "merge-check",
        "plan",
        "drift",
    ],
)
def test_help_of_every_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([verb, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


def test_help_lists_the_pipeline_first_and_in_its_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    verbs = [words[1] for line in lines if len(words := line.split()) > 2 and words[0] == "│" and line[2] != " "]
    listed = [verb for verb in verbs if verb.isalpha()]
    assert listed[:7] == ["run", "collect", "select", "convert", "precompute", "train", "evaluate"]


@pytest.mark.parametrize("arguments", [["train"], ["bogus"], ["run", "x.yaml", "--nonsense"]])
def test_bad_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(arguments) == 2
    assert "Traceback" not in _error(capsys)


def test_unknown_key_is_2_and_names_the_nearest(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", str(config_file), "train.stepz=3"]) == 2
    assert "unknown field 'train.stepz'; did you mean 'steps'?" in _error(capsys)


def test_missing_configuration_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", "nowhere.yaml"]) == 2
    assert "no configuration file at nowhere.yaml" in _error(capsys)


def test_missing_model_is_1_and_leaves_no_stage(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", str(config_file), "model.path=/nowhere"]) == 1
    error = _error(capsys)
    assert "model.path: no directory at /nowhere" in error
    assert "Traceback" not in error


def test_unknown_stage_is_2(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", str(config_file), "--from", "trane"]) == 2
    assert "there is no stage 'trane'" in _error(capsys)


def test_unwritable_run_directory_is_1(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run_command(["collect", str(config_file), f"run.directory={tmp_path}/file/run"]) == 1
    assert "cannot write" in _error(capsys)


def test_config_shows_values_and_origins(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["config", str(config_file), "train.steps=9"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    position = next(number for number, line in enumerate(lines) if line.startswith("train.steps "))
    assert lines[position].endswith(" 9")
    assert lines[position + 1] == "(override train.steps=9) optimiser steps"


@pytest.mark.parametrize("verb", ["run", "collect", "convert", "precompute", "train", "evaluate"])
def test_strict_is_the_same_as_its_field(verb: str, config_file: Path, monkeypatch) -> None:
    seen: list[Config] = []
    for name in ("run_pipeline", "run_single_stage"):
        monkeypatch.setattr(f"nexus_ray.pipeline.{name}", lambda config, *_, **__: seen.append(config))
    last = ["--until", "collect"] if verb == "run" else []
    for arguments in ([], ["--strict"], ["data.strict=true"]):
        assert run_command([verb, str(config_file), *last, *arguments]) == 0
    assert [config.data.strict for config in seen] == [False, True, True]


@pytest.mark.parametrize(
    ("arguments", "again"),
    [
        ([], "the same command continues"),
        (["--from", "train"], "the same command without --from continues"),
        (["--from=train"], "the same command without --from continues"),
    ],
)
def test_keyboard_interrupt_is_130(
    arguments: list[str], again: str, config_file: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nexus_ray.pipeline.run_pipeline", interrupt)
    assert run_command(["run", str(config_file), *arguments]) == 130
    assert f"{again} where this one stopped" in _error(capsys)


def test_plot_of_a_directory_without_metrics_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plot", str(tmp_path)]) == 1
    assert "has no metrics.jsonl" in _error(capsys)


def test_plot_draws_two_runs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        records = [{"event": "step", "step": step, "loss": 3.0 / (step + 1)} for step in range(30)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    figure = tmp_path / "runs.png"
    assert run_command(["plot", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(figure)]) == 0
    assert figure.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["demo", "gpt-oss-20b", "gpt-oss-120b"])
def test_shipped_configurations_are_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    assert run_command(["config", str(path)]) == 0
    assert yaml.safe_load(path.read_text())["run"]["directory"] == f"runs/{name}"


def test_the_last_line_is_where_the_artefacts_lie(config_file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """In a job or a pipe; `done:` is for people, the JSON object for programs."""
    overlay = tmp_path / "run" / "overlay"
    monkeypatch.setattr("nexus_ray.pipeline.run_single_stage", lambda *_, **__: overlay.mkdir(parents=True))
    monkeypatch.chdir(tmp_path)
    assert run_command(["train", str(config_file), "run.directory=run"]) == 0
    people, programs = capsys.readouterr().out.splitlines()
    assert people == f"done: overlay {overlay}"
    assert json.loads(programs) == {"done": "train", "artefacts": {"overlay": str(overlay)}}


@pytest.mark.parametrize(("directory", "warned"), [("runs/a", True), ("/elsewhere/a", False)])
def test_a_job_whose_run_directory_is_in_rays_copy_of_the_working_directory_is_told(
    directory: str, warned: bool, config_file: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    copy = tmp_path / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.setattr("nexus_ray.pipeline.run_single_stage", lambda *_, **__: None)
    monkeypatch.chdir(copy)
    assert run_command(["train", str(config_file), f"run.directory={directory}"]) == 0
    assert (f"WARNING run.directory={directory} is in the copy" in _error(capsys)) == warned
