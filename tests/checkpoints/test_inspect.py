"""`nexus-ray checkpoint inspect`: what it shows, and that it finds what is broken."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.cli import run_command
from nexus_ray.storage import sha256_file


@pytest.fixture
def copy(micro_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro_model, tmp_path / "copy"))


def _inspect(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_command(["checkpoint", "inspect", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


def test_a_model_with_its_hashes(micro_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = _inspect(capsys, str(micro_model), "--sha256")
    assert code == 0
    assert f"gpt_oss, fingerprint {fingerprint(micro_model)}\n" in shown
    assert f"{sha256_file(micro_model / 'model.safetensors')}  model.safetensors\n" in shown
    with safe_open(micro_model / "model.safetensors", "pt") as file:
        packed = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (it is no dict)
        packed = [tensor for tensor in packed if tensor.get_dtype() == "U8"]
    (row,) = [line for line in shown.splitlines() if "U8" in line]
    assert [cell.strip() for cell in row.split("│")][3] == str(len(packed))


def test_hashes_are_on_demand(micro_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sha256_file(micro_model / "model.safetensors") not in _inspect(capsys, str(micro_model))[1]


def test_an_overlay(micro_overlay: Path, micro_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = _inspect(capsys, str(micro_overlay))
    assert code == 0
    assert f"overlay of 25,092 parameters in float32, for the base {fingerprint(micro_model)}" in shown


def test_a_tensor_that_only_the_index_has(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"ghost": "a.safetensors"}}))
    code, _, error = _inspect(capsys, str(copy))
    assert code == 1
    assert "has no tensor ghost, but the checkpoint's index says so" in error


def test_a_cut_off_file(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(copy / "model.safetensors", 100_000)
    code, _, error = _inspect(capsys, str(copy))
    assert code == 1
    assert "model.safetensors is damaged: it is cut off" in error


def test_no_model_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = _inspect(capsys, str(tmp_path / "nowhere"))
    assert code == 1
    assert "has neither model.safetensors.index.json nor model.safetensors" in error
