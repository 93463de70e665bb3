"""Initialisation: which experts each method reads, what it makes of them, and that zeroed ones start at the base."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GptOssForCausalLM

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import load_overlay
from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.config import Config
from nexus_ray.data.packing import batches, pack
from nexus_ray.errors import ArtefactError, ConfigError
from nexus_ray.families import FAMILIES
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import load_base, load_student
from nexus_ray.router import initialise
from nexus_ray.router.initialise import convert, experts_to_average, mean_expert
from nexus_ray.router.selection import ExpertRanking

MakeConfig = Callable[..., Config]
RANKING = ExpertRanking(
    used=[[3, 1, 0, 2, 4, 5, 6, 7], [2, 6, 1, 0, 3, 4, 5, 7]],
    important=[[7, 6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7]],
    used_overall=6,
)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("zero", []),
        ("random", []),
        ("top1", [3]),
        ("top1_zero", [3]),
        ("top1_average", [6]),
        ("top4_average", [3, 1, 0, 2]),
        ("pca_topK", [7, 6, 5]),
        ("pca_top2", [7, 6]),
    ],
)
def test_experts_of_each_method(method: str, expected: list[int]) -> None:
    assert experts_to_average(method, RANKING, layer=0, top_k=3) == expected


def test_mean_expert_is_the_mean_of_stock_experts(micro_model: Path) -> None:
    stock = GptOssForCausalLM.from_pretrained(micro_model, dtype=torch.float32).model.layers[1].mlp.experts
    with CheckpointReader(micro_model) as reader:
        mean = mean_expert(FAMILIES["gpt_oss"], reader, 1, [0, 4, 7])
    gate_up = stock.gate_up_proj[[0, 4, 7]].mean(0).T
    assert torch.allclose(mean.gate_up, torch.cat([gate_up[0::2], gate_up[1::2]]), atol=1e-6)
    assert torch.allclose(mean.down, stock.down_proj[[0, 4, 7]].mean(0).T, atol=1e-6)
    assert torch.allclose(mean.down_bias, stock.down_proj_bias[[0, 4, 7]].mean(0), atol=1e-6)


@pytest.fixture
def convert_with(
    make_micro_config: MakeConfig, micro_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    """Convert with RANKING in the place of a selection from statistics."""

    class FixedSelection:
        base_fingerprint = fingerprint(micro_model)
        layers = (0, 1)

        @classmethod
        def load(cls, path: Path) -> "FixedSelection":
            return cls()

        def ranking(self) -> ExpertRanking:
            return RANKING

    monkeypatch.setattr(initialise, "Selection", FixedSelection)

    def run(**overrides: object) -> Config:
        config = make_micro_config(tmp_path / "run", **{f"convert.{key}": value for key, value in overrides.items()})
        convert(config, RunLayout(config.run.directory))
        return config

    return run


@pytest.mark.parametrize("method", ["zero", "top1_zero"])
def test_zeroed_methods_start_at_the_base_bit_for_bit(convert_with: Callable[..., Config], method: str) -> None:
    config = convert_with(initialisation=method)
    batch = next(batches(pack([list(range(100, 160))], 32, 4097), 2))
    student = load_student(config.model, RunLayout(config.run.directory).initial_overlay)
    assert torch.equal(student.forward_batch(batch)[0], load_base(config.model).forward_batch(batch)[0])


def test_top1_copies_the_most_used_expert_of_each_layer(convert_with: Callable[..., Config]) -> None:
    config = convert_with(initialisation="top1", token_gate=False, scale=0.2)
    description, tensors = load_overlay(RunLayout(config.run.directory).initial_overlay, fingerprint(config.model.path))
    assert not description.token_gate
    with CheckpointReader(config.model.path) as reader:
        for layer, expert in ((0, 3), (1, 2)):
            weights = FAMILIES["gpt_oss"].read_expert(reader, layer, expert)
            assert torch.equal(tensors[f"layers.{layer}.gate_up_proj.weight"], weights.gate_up)
            assert torch.equal(tensors[f"layers.{layer}.down_proj.weight"], weights.down)
            assert tensors[f"layers.{layer}.scale"].item() == pytest.approx(0.2)


def test_random_depends_on_the_seed_only(convert_with: Callable[..., Config], micro_model: Path) -> None:
    name = "layers.1.gate_up_proj.weight"
    first, second = (
        load_overlay(
            RunLayout(convert_with(initialisation="random", width=96).run.directory).initial_overlay,
            fingerprint(micro_model),
        )[1][name]
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.shape == (192, 64)


def test_width_of_a_copy_cannot_differ(convert_with: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"convert\.width is 96, but top1 copies experts of width 64"):
        convert_with(initialisation="top1", width=96)


def test_more_experts_than_a_layer_has(convert_with: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="pca_top24, but a layer has 8 experts"):
        convert_with(initialisation="pca_top24")


def test_selection_is_needed_and_named(make_micro_config: MakeConfig, tmp_path: Path) -> None:
    config = make_micro_config(tmp_path / "run")
    with pytest.raises(ArtefactError, match=r"selection"):
        convert(config, RunLayout(config.run.directory))
    assert not list(tmp_path.glob("run/overlay-initial*"))
