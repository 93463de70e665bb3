"""The verbs that look at trainings: what `plot` draws of one run and of several, what `plan` says of schedules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation.synthetic import training_records
from matplotlib.figure import Figure

from nexus_ray import plot_style
from nexus_ray.cli import run_command

DEMO = str(Path(__file__).parents[1] / "configs" / "demo.yaml")


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The titles of each figure that would be saved."""
    found: list[list[str]] = []

    def spy(figure: Figure, path: Path) -> None:
        found.append([axes.get_title(loc="left") for axes in figure.axes])

    monkeypatch.setattr(plot_style, "save", spy)
    return found


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two run directories."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in training_records())
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    return [str(tmp_path / name) for name in ("a", "b")]


def test_plot_of_one_run_is_its_page_and_of_two_a_comparison(runs: list[str], titles: list[list[str]]):
    assert run_command(["plot", runs[0]]) == 0
    assert run_command(["plot", *runs]) == 0
    assert titles[0][:2] == ["Loss", "Parts of the loss, weighted"]
    assert titles[1] == ["Training loss", "Validation loss"]


def test_plot_draws_the_metrics_that_are_asked_for(runs: list[str], titles: list[list[str]]):
    assert run_command(["plot", runs[0], "--metric", "gradient_norm", "-m", "validation/losses/play"]) == 0
    assert titles == [["train/gradient_norm", "validation/losses/play"]]


@pytest.mark.parametrize("bad", [["--metric", "nothing"], ["-o", "page.pdf"]])
def test_what_plot_cannot_draw_is_2(bad: list[str], runs: list[str], capsys: pytest.CaptureFixture[str]):
    assert run_command(["plot", runs[0], *bad]) == 2
    assert bad[1] in capsys.readouterr().err


def test_plan_shows_and_draws_schedules(
    titles: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(Path(DEMO).parents[1])
    override = "train.sources.code.output_kl=[[0, 0], [0.5, 4]]"
    assert run_command(["plan", DEMO, override, "--json", "--plot", str(tmp_path / "s.png")]) == 0
    planned: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert planned["schedules"]["steps"] == 160
    assert planned["schedules"]["values"]["weight of code, output_kl"]["last"] == 4.0
    assert titles == [["Learning rate", "Temperatures", "Weights that change"]]
