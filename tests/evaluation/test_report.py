"""report.json and report.md from an evaluation and the artefacts of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation.synthetic import evaluation, source_result, training_records
from rich.console import Console

from nexus_ray.checkpoints.overlay import load_overlay, load_overlay_config, save_overlay
from nexus_ray.config import Config
from nexus_ray.errors import ArtefactError
from nexus_ray.evaluation.report import console_table, summarise_training, write_report
from nexus_ray.layout import RunLayout
from nexus_ray.storage import write_json, write_text

HELPED = evaluation((1126.0, 106.0, (0.092, 0.097)), (51.0, 51.1, (0.995, 1.009)))


@pytest.fixture
def config(micro_config: Callable[..., Config], tmp_path: Path) -> Config:
    return micro_config(tmp_path / "run")


@pytest.fixture
def layout(config: Config, micro_overlay: Path) -> RunLayout:
    """A run directory with nothing but a trained overlay."""
    layout = RunLayout(config.run.directory)
    description = load_overlay_config(micro_overlay)
    save_overlay(layout.overlay, description, load_overlay(micro_overlay, description.base_fingerprint)[1])
    return layout


def add_other_artefacts(layout: RunLayout) -> None:
    write_text(layout.metrics, "".join(json.dumps(record) + "\n" for record in training_records()))
    for seconds, name in enumerate(("train", "collect", "evaluate"), start=60):
        write_json(layout.stages / f"{name}.json", {"stage": name, "seconds": seconds, "outputs": {}})
    write_text(layout.stages / "select.json", "not JSON")
    layers = [
        {
            "ranked": [5, 3, 1],
            "selected": [5, 3],
            "share": 0.41,
            "null_share": 0.3,
            "split_half_overlap": None,
            "chance_overlap": 0.25,
        },
        {
            "ranked": [7, 0, 2],
            "selected": [7, 0],
            "share": 0.52,
            "null_share": 0.3,
            "split_half_overlap": 0.5,
            "chance_overlap": 0.25,
            "verdict": "stable",
        },
    ]
    write_json(layout.selection, {"method": "pca", "top_k": 2, "layers": layers})


def test_the_json_holds_the_numbers_at_the_promised_places(config: Config, layout: RunLayout):
    add_other_artefacts(layout)
    returned = write_report(config, layout, HELPED, seconds=12.5)
    report = json.loads(layout.report.read_text())
    assert report == returned
    assert list(report) == [
        "format_version",
        "run",
        "base",
        "overlay",
        "evaluation",
        "training",
        "stages",
        "selection",
        "samples",
        "tasks",
    ]
    assert report["evaluation"]["play"]["student"]["token_perplexity"] == 106.0
    assert report["evaluation"]["prose"]["base"]["token_perplexity"] == 51.0
    assert report["base"]["fingerprint"] == load_overlay_config(layout.overlay).base_fingerprint
    assert report["stages"] == {"collect": 61.0, "train": 60.0, "evaluate": 12.5}
    assert report["selection"]["layers"][1]["selected"] == [7, 0]
    assert "ranked" not in report["selection"]["layers"][1]


def test_the_overlay_is_described_by_what_is_on_disk(config: Config, layout: RunLayout):
    overlay = write_report(config, layout, HELPED)["overlay"]
    tensors = layout.overlay / "overlay.safetensors"
    base_bytes = sum(file.stat().st_size for file in config.model.path.glob("*.safetensors"))
    header = int.from_bytes(tensors.read_bytes()[:8], "little") + 8
    assert overlay["parameters"] == (tensors.stat().st_size - header) // 4  # float32
    assert overlay["bytes"] == tensors.stat().st_size
    assert overlay["percent_of_base"] == pytest.approx(100 * overlay["bytes"] / base_bytes)


def test_the_markdown_answers_first_and_shows_its_figures(config: Config, layout: RunLayout):
    add_other_artefacts(layout)
    write_report(config, layout, HELPED, seconds=12.5)
    text = layout.report.with_suffix(".md").read_text()
    assert text.split("\n")[2].startswith("**The overlay helped on the domain.**")
    assert "| play | domain | 1,126 [1,081, 1,171] | 106 [102, 110] | **-90.6 %** | -90.8 % to -90.3 % |" in text
    assert "| 1 | 7, 0 | 52 % | 30 % | 50 % | 25 % |" in text
    assert "| evaluate | 12 s |" in text
    figures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(figures) == 3
    for figure in figures:
        assert (layout.directory / figure).read_bytes().startswith(b"\x89PNG")


def test_every_table_of_the_markdown_is_rectangular(config: Config, layout: RunLayout):
    add_other_artefacts(layout)
    write_report(config, layout, {"a|b": source_result("domain", 50, 40, (0.7, 0.9))}, seconds=1)
    for block in layout.report.with_suffix(".md").read_text().split("\n\n"):
        if block.startswith("|"):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_a_run_with_an_overlay_only_still_gets_a_report(config: Config, layout: RunLayout):
    report = write_report(config, layout, HELPED)
    assert report["training"] is None
    assert report["selection"] is None
    assert report["stages"] == {}
    text = layout.report.with_suffix(".md").read_text()
    assert "## Training" not in text
    assert "plots/training.png" not in text


def test_without_an_overlay_there_is_no_report(config: Config):
    layout = RunLayout(config.run.directory)
    with pytest.raises(ArtefactError, match="no overlay"):
        write_report(config, layout, HELPED)
    assert not layout.report.exists()


def test_caveats_name_what_weakens_the_evidence(config: Config, layout: RunLayout):
    few = {"play": source_result("domain", 50, 40, (0.7, 0.9), units=12)}
    write_report(config, layout, few)
    text = layout.report.with_suffix(".md").read_text()
    assert "Too few for a trustworthy interval: play (12 sequences)." in text
    assert "No retention text was scored" in text
    write_report(config, layout, HELPED)
    text = layout.report.with_suffix(".md").read_text()
    assert "Too few" not in text
    assert "No retention text" not in text
    assert "one seed (0)" in text


def test_training_is_summarised_from_its_records():
    summary = summarise_training(training_records(steps=40))
    assert summary is not None
    assert (summary["steps"], summary["tokens"], summary["seconds"]) == (40, 40 * 512, 20.0)
    assert (summary["best_step"], summary["best_validation_loss"]) == (30, 4.2)
    assert summary["resumes"] == 1
    assert summarise_training([{"event": "resume", "step": 0}]) is None


def render_plain(report: dict[str, Any]) -> str:
    console = Console(width=80, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(console_table(report))
    return capture.get()


def test_the_table_is_readable_without_a_terminal():
    report = {"run": {"confidence": 0.95}, "evaluation": HELPED | {"[x] y": HELPED["prose"]}}
    text = render_plain(report)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 80
    row = next(line for line in text.splitlines() if "play" in line)
    for value in ("domain", "1,126", "106", "-90.6 %", "-90.8 % to -90.3 %"):
        assert value in row
    assert "[x] y" in text
    assert "The overlay helped on the domain." in text
