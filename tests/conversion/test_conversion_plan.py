"""Planning a conversion: which experts each method reads, what it costs, and what is refused before any weight."""

import json
import shutil

import pytest
import torch

from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.cli import run_command
from nexus_ray.config import load_config, save_config
from nexus_ray.conversion.plan import experts_to_average, plan_conversion
from nexus_ray.errors import ArtefactError, ConfigError, ModelError
from nexus_ray.layout import RunLayout
from nexus_ray.selection.record import ExpertRanking

RANKING = ExpertRanking(
    used=[[3, 1, 0, 2, 4, 5, 6, 7], [2, 6, 1, 0, 3, 4, 5, 7]],
    important=[[7, 6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7]],
    used_overall=6,
    counts=[3, 5],
    reap=[[5, 2, 0, 1, 3, 4, 6, 7], [1, 0, 2, 3, 4, 5, 6, 7]],
)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("zero", []),
        ("random", []),
        ("top1", [3]),
        ("top1_zero", [3]),
        ("lstsq", [3]),
        ("top1_average", [6]),
        ("top4_average", [3, 1, 0, 2]),
        ("pca_topK", [7, 6, 5]),
        ("pca_top2", [7, 6]),
        ("aligned_top2", [7, 6]),
        ("aligned_topK", [7, 6, 5]),
        ("reap_top2", [5, 2]),
        ("reap_topK", [5, 2, 0]),
    ],
)
def test_experts_of_each_method(method, expected):
    assert experts_to_average(method, RANKING, layer=0) == expected


@pytest.mark.parametrize(
    ("method", "expected"),
    [("pca_topK", [0, 1, 2, 3, 4]), ("aligned_topK", [0, 1, 2, 3, 4]), ("reap_topK", [1, 0, 2, 3, 4])],
)
def test_k_is_how_many_the_layer_selects(method, expected):
    assert experts_to_average(method, RANKING, layer=1) == expected


def test_layers_of_different_k_are_read_and_paid_for_as_selected(ranked_run):
    config, layout, selection = ranked_run(
        **{"convert.initialisation": "pca_topK", "select.method": "pca_variance", "select.coverage": 0.7}
    )
    plan = plan_conversion(config, layout)
    assert [list(layer) for layer in plan.experts] == [list(layer.selected) for layer in selection.layers]
    first, second = map(len, plan.experts)
    assert first != second
    assert plan.expert_bytes[0] * second == plan.expert_bytes[1] * first


def test_experts_passed_over_come_last_in_what_is_averaged(ranked_run):
    config, layout, selection = ranked_run(
        **{"convert.initialisation": "pca_top6", "select.max_correlation": 0.0, "select.top_k": 2}
    )
    passed_over = [set(layer.passed_over) for layer in selection.layers]
    assert all(passed_over)
    for experts, last in zip(plan_conversion(config, layout).experts, passed_over, strict=True):
        kept = [expert for expert in experts if expert not in last]
        assert list(experts[: len(kept)]) == kept


def test_reap_without_saliencies_says_how_to_get_them(ranked_run):
    config, layout, _ = ranked_run(with_norms=False, **{"convert.initialisation": "reap_topK"})
    with pytest.raises(ArtefactError, match="no expert output norms") as caught:
        plan_conversion(config, layout)
    assert "model.experts=packed" in caught.value.hint
    assert "--from collect" in caught.value.hint


@pytest.mark.parametrize("method", ["pca_top24", "reap_top24", "aligned_top24"])
def test_more_experts_than_a_layer_has(ranked_run, method):
    config, layout, _ = ranked_run(**{"convert.initialisation": method})
    with pytest.raises(ConfigError, match=f"{method}, which takes 24 experts, but a layer has 8 experts"):
        plan_conversion(config, layout)


def test_selection_is_needed_and_named(micro_config, tmp_path):
    config = micro_config(tmp_path / "run")
    with pytest.raises(ArtefactError, match=r"no expert selection at .*selection\.json"):
        plan_conversion(config, RunLayout(config.run.directory))


def test_bytes_are_those_of_the_tensors(ranked_run, micro_model):
    config, layout, selection = ranked_run(**{"convert.initialisation": "pca_topK", "convert.dtype": "bfloat16"})
    plan = plan_conversion(config, layout)
    assert [list(layer) for layer in plan.experts] == [selection.experts(layer)[:4] for layer in range(2)]
    with CheckpointReader(micro_model) as reader:
        names = [name for name in reader.names if name.startswith("model.layers.0.mlp.experts.")]
        expert = sum(reader.read_slice(name, 0).nbytes for name in names)
    assert plan.expert_bytes == (4 * expert, 4 * expert)
    # gate/up and down with biases, token gate and its bias in two bytes; the output scale in four
    assert plan.bytes_written == 2 * (2 * (128 * 64 + 128 + 64 * 64 + 64 + 64 + 1) + 4)


def test_an_export_says_that_it_already_has_shared_experts(ranked_run, micro_model, tmp_path):
    config, layout, _ = ranked_run()
    shutil.copytree(micro_model, tmp_path / "export")
    described = json.loads((micro_model / "config.json").read_text())
    (tmp_path / "export" / "config.json").write_text(json.dumps(described | {"model_type": "nexus_gpt_oss"}))
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": tmp_path / "export"})})
    with pytest.raises(ModelError, match="already contains shared experts") as caught:
        plan_conversion(config, layout)
    assert "base model" in caught.value.hint


@pytest.mark.parametrize(("field", "value"), [("num_local_experts", 6), ("intermediate_size", 96)])
def test_a_checkpoint_of_another_shape_than_its_config_is_refused(micro_config, micro_model, tmp_path, field, value):
    shutil.copytree(micro_model, tmp_path / "lying")
    described = json.loads((micro_model / "config.json").read_text())
    (tmp_path / "lying" / "config.json").write_text(json.dumps(described | {field: value}))
    config = micro_config(tmp_path / "run", **{"model.path": str(tmp_path / "lying"), "convert.initialisation": "zero"})
    with pytest.raises(ModelError, match=r"gate_up_proj_blocks holds 8 experts of \[128, 64\]"):
        plan_conversion(config, RunLayout(config.run.directory))


def test_dry_run_prints_the_plan_and_writes_nothing(ranked_run, tmp_path, capsys):
    config, layout, selection = ranked_run(**{"convert.initialisation": "aligned_top2"})
    save_config(config, tmp_path / "run.yaml")
    before = sorted(tmp_path.rglob("*"))
    assert run_command(["convert", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    plan = plan_conversion(load_config(tmp_path / "run.yaml", []), layout)
    assert f"{sum(plan.expert_bytes):,} bytes of experts" in shown
    assert f"{plan.bytes_written:,} bytes" in shown
    assert f"{plan.description.parameters:,} parameters" in shown
    for layer in range(2):
        assert " ".join(map(str, selection.experts(layer)[:2])) in shown
    assert sorted(tmp_path.rglob("*")) == before


def test_planning_reads_no_weights(ranked_run, monkeypatch):
    config, layout, _ = ranked_run(**{"convert.initialisation": "pca_topK"})

    def refuse(*arguments: object) -> torch.Tensor:
        raise AssertionError("a weight was read")

    for name in ("read", "read_slice", "read_rows"):
        monkeypatch.setattr(CheckpointReader, name, refuse)
    plan_conversion(config, layout)
