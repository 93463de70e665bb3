"""docs/scaling.md says what the code says, and `nexus-ray plan` says the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nexus_ray.cli import run_command
from nexus_ray.planning.cost_table import bytes_text, duration_text, money_text
from nexus_ray.planning.scale.page import EXAMPLE_GPUS, page_tables, with_tables

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    return page_tables(ROOT / "configs")


def test_the_page_has_the_tables_of_the_code(tables: dict[str, str]) -> None:
    assert with_tables(PAGE, tables) == PAGE, "run `python tools/scaling_page.py` and look at the differences"


def test_a_marker_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match="'other'"):
        with_tables("<!-- begin other -->\n<!-- end other -->", {})
    with pytest.raises(ValueError, match="'mine'"):
        with_tables("no marker", {"mine": ""})


def _rows(model: str) -> dict[str, list[str]]:
    """Cells of the page's table of an example configuration, by stage."""
    found = re.search(rf"<!-- begin example-{model} -->\n(.*?)\n<!-- end", PAGE, re.DOTALL)
    assert found
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()[2:]]
    return {cells[0]: cells[1:] for cells in lines}


def _plan(model: str, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert run_command(["plan", str(ROOT / "configs" / f"{model}.yaml"), "--json", *options]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


@pytest.mark.parametrize("model", list(EXAMPLE_GPUS))
def test_the_plan_of_an_example_agrees_with_the_page(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # neither model nor text is here
    plan = _plan(model, capsys, "--hardware", f"h100x{EXAMPLE_GPUS[model]}")
    rows, cost = _rows(model), plan["cost"]
    assert list(cost["stages"]) == list(rows)[:-1]
    for name, stage in cost["stages"].items():
        assert rows[name][:2] == [duration_text(stage["seconds"]), duration_text(stage["fixed_seconds"])]
        assert rows[name][3] == (f"{stage['gpu_hours']:,.2f}" if stage["gpus"] else "")
        assert rows[name][4] == bytes_text(stage["moved_bytes"])
    total = [duration_text(cost["seconds"]), f"{cost['gpu_hours']:,.1f}", f"${money_text(cost['cost'])}"]
    assert [rows["sum"][0], rows["sum"][3], rows["sum"][5]] == total
    assert plan["sizes_from"] == f"the published configuration of {model}"


def test_the_plan_without_named_hardware_has_the_same_stages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A machine without GPUs stands for H100s, which need not be started and have no price."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    plan, rows = _plan("gpt-oss-120b", capsys), _rows("gpt-oss-120b")
    assert list(plan["cost"]["stages"]) == list(rows)[1:-1]
    for name, stage in plan["cost"]["stages"].items():
        assert rows[name][0] == duration_text(stage["seconds"])
    assert plan["cost"]["cost"] is None


def test_the_placement_of_the_page_is_that_of_the_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    why = _plan("gpt-oss-120b", capsys, "--hardware", "h100x4")["placements"]["train"]["why"]
    layers, weights = re.search(r"layers (.*?), because", why), re.search(r"[\d.]+ GiB of weights", why)
    assert layers
    assert weights
    assert f"layers {layers[1]}, because {weights[0]}" in " ".join(PAGE.split())


def test_the_command_prints_placement_and_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["plan", str(ROOT / "configs" / "gpt-oss-120b.yaml"), "--hardware", "h100x4"]) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines()) <= 80
    text = " ".join(printed.split())
    assert "shapes from the published configuration of gpt-oss-120b" in text
    assert "placement of train: 2 GPUs a worker, layers 0-16 | 17-35, because 60.8 GiB of weights" in text
    assert "placement of collect, precompute, evaluate, serve: " in text
    assert "assumed, no GPU was measured" in text
    assert "for one GPU for one hour" in text


def test_unknown_hardware_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", str(ROOT / "configs" / "demo.yaml"), "--hardware", "abacusx8"]) == 2
    assert "plan.hardware='abacusx8' is no known GPU" in capsys.readouterr().err.replace("\n", " ")


def test_what_the_text_says_of_a_small_run_is_in_its_table(tables: dict[str, str]) -> None:
    said = re.search(
        r"take ([\d.]+) minutes on 64 GPUs and ([\d.]+) on eight, at ([\d.]+) times", " ".join(PAGE.split())
    )
    assert said
    cells = tables["run-gpt-oss-120b"].splitlines()[2].split(" | ")
    (eight, money), (many, more) = (re.findall(r"^([\d.]+) min.*\$([\d.]+)$", cell)[0] for cell in cells[2:4])
    assert (said[1], said[2]) == (many, eight)
    assert float(said[3]) == pytest.approx(float(more) / float(money), abs=0.05)
