"""Sizes of a model that is not here: those of the published checkpoints, and of `config.json` alone."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig

from nexus_ray.errors import ModelError
from nexus_ray.planning.published import CONFIGURATION, CONFIGURATIONS, gpt_oss_specs, model_sizes
from nexus_ray.planning.sizes import read_sizes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_tensors_are_those_of_the_true_shape_checkpoints(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint maker lists the published names, shapes and types on its own."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    shapes = importlib.import_module("_true_shape")
    expected = shapes.checkpoint_specs(shapes.SHAPES[name])
    found = list(gpt_oss_specs(CONFIGURATIONS[name]))
    assert {(spec.name, spec.dtype, spec.shape) for spec in found} == {
        (spec.name, spec.dtype, spec.shape) for spec in expected
    }


@pytest.mark.parametrize(
    ("name", "parameters", "stored"), [("gpt-oss-20b", 20.9e9, 13.76e9), ("gpt-oss-120b", 116.8e9, 65.25e9)]
)
def test_sizes_are_those_that_the_makers_print(name: str, parameters: float, stored: float, tmp_path: Path) -> None:
    """Parameters: gpt-oss model card, table 1; bytes: the repositories' `model.safetensors.index.json`."""
    sizes = model_sizes(tmp_path / name)
    assert sizes.parameters == pytest.approx(parameters, rel=0.002)
    assert sizes.stored_bytes == pytest.approx(stored, rel=0.002)
    assert name in sizes.origin


def test_parameters_are_those_of_the_model_that_transformers_builds(tmp_path: Path) -> None:
    config = CONFIGURATIONS["gpt-oss-20b"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(GptOssConfig(**config))
    assert model_sizes(tmp_path / "gpt-oss-20b").parameters == sum(p.numel() for p in model.parameters())


def test_a_configuration_alone_gives_the_sizes_of_its_files(micro_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((micro_model / "config.json").read_text())
    found, expected = model_sizes(tmp_path), read_sizes(micro_model)
    assert found.origin == CONFIGURATION
    assert (found.packed_bytes, found.plain_parameters) == (expected.packed_bytes, expected.plain_parameters)
    assert found.layers == expected.layers


def test_an_unknown_model_that_is_not_here_is_refused_with_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no directory at .*my-model") as caught:
        model_sizes(tmp_path / "my-model")
    assert "gpt-oss-20b or gpt-oss-120b" in str(caught.value.hint)


def test_a_configuration_alone_that_lacks_a_field_is_refused(micro_model: Path, tmp_path: Path) -> None:
    values = json.loads((micro_model / "config.json").read_text())
    del values["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="vocab_size"):
        model_sizes(tmp_path)


def test_a_damaged_model_is_not_replaced_by_a_published_one(tmp_path: Path) -> None:
    (tmp_path / "gpt-oss-20b").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        model_sizes(tmp_path / "gpt-oss-20b")
