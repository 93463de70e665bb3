"""Finding layers of copied experts in checkpoints, reading no more than that takes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GptOssForCausalLM

from nexus_ray.checkpoints.quantised_export import export_mxfp4
from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.config import ArchitectureSection
from nexus_ray.families import FAMILIES
from nexus_ray.pretraining.model import build_config
from nexus_ray.selection.identical import experts_are_identical, layers_of_identical_experts

SHAPE = ArchitectureSection(
    layers=3, hidden_size=64, intermediate_size=64, experts=4, attention_heads=2, key_value_heads=1
)


@pytest.fixture
def make_model(tokenizer_directory: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function (packed) -> a model with copied experts in layer 0, in layer 1 but for one value, not in layer 2."""

    def make(*, packed: bool) -> Path:
        torch.manual_seed(0)
        model = GptOssForCausalLM(build_config(SHAPE, AutoTokenizer.from_pretrained(tokenizer_directory)))
        for layer in (0, 1):
            for values in model.model.layers[layer].mlp.experts.parameters():
                values.data.copy_(torch.randn(values.shape[1:]).expand_as(values))
        model.model.layers[1].mlp.experts.down_proj_bias.data[3, -1] += 1
        path = tmp_path / "model"
        if packed:
            export_mxfp4(model, tokenizer_directory, path)
        else:
            model.bfloat16().save_pretrained(path)
        return path

    return make


@pytest.mark.parametrize("packed", [True, False])
def test_copied_experts_are_found_in_either_storage_form(make_model, packed):
    assert layers_of_identical_experts(make_model(packed=packed)) == {0}


def test_a_trained_model_has_none(tokenizer_directory):
    assert layers_of_identical_experts(tokenizer_directory) == frozenset()


def test_different_experts_are_told_apart_by_their_first_rows(make_model, monkeypatch):
    rows = []
    read_rows = CheckpointReader.read_rows

    def counted(self, name, index, start, stop):
        rows.append((index, start, stop))
        return read_rows(self, name, index, start, stop)

    with CheckpointReader(make_model(packed=True)) as reader:
        parts = [FAMILIES["gpt_oss"].expert_parts(reader, layer) for layer in (2, 0)]
        monkeypatch.setattr(CheckpointReader, "read_rows", counted)
        assert not experts_are_identical(parts[0])
        assert {(index, start) for index, start, _ in rows} == {(0, 0), (1, 0)}
        assert max(stop for *_, stop in rows) <= 8
        assert experts_are_identical(parts[1])
        assert max(stop for *_, stop in rows) == 128


def test_a_single_expert_is_no_copy(make_model):
    class One:
        experts = 1

    class Parts:
        gate_up = One()

    assert not experts_are_identical(Parts())
