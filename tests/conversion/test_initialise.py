"""The convert stage: what each method writes, where it starts, and that it touches no more than it needs."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from transformers import GptOssForCausalLM

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import load_overlay
from nexus_ray.checkpoints.reader import CheckpointReader
from nexus_ray.config import save_config
from nexus_ray.conversion import initialise
from nexus_ray.conversion.averaging import mean_expert
from nexus_ray.conversion.initialise import convert
from nexus_ray.data.packing import batches, pack
from nexus_ray.errors import ModelError, StorageError
from nexus_ray.families import FAMILIES
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import load_base, load_student

MLP = ("gate_up_proj.weight", "gate_up_proj.bias", "down_proj.weight", "down_proj.bias")


@pytest.fixture
def converted(ranked_run, micro_model):
    """A function (**convert fields) -> (config, description, tensors, selection)."""

    def run(**fields):
        overrides = {f"convert.{key}": value for key, value in fields.items()}
        config, layout, selection = ranked_run(**overrides)
        convert(config, layout)
        description, tensors = load_overlay(layout.initial_overlay, fingerprint(micro_model))
        return config, description, tensors, selection

    return run


def base_digest(directory) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.mark.parametrize("fields", [{"initialisation": "zero"}, {"initialisation": "zero", "width": 40}])
def test_zeroed_methods_start_at_the_base_bit_for_bit(converted, fields):
    config, _, _, _ = converted(**fields)
    assert_starts_at_the_base(config)


def test_top1_zero_starts_at_the_base_bit_for_bit_with_trained_gates(converted):
    config, _, tensors, _ = converted(initialisation="top1_zero")
    assert tensors["layers.0.gate_up_proj.weight"].any()
    assert_starts_at_the_base(config)


def assert_starts_at_the_base(config) -> None:
    batch = next(batches(pack([list(range(100, 160))], 32, 4097), 2))
    student = load_student(config.model, RunLayout(config.run.directory).initial_overlay)
    assert torch.equal(student.forward_batch(batch)[0], load_base(config.model).forward_batch(batch)[0])


def test_top1_copies_the_most_used_expert_of_each_layer(converted):
    config, description, tensors, selection = converted(initialisation="top1", token_gate=False, scale=0.2)
    assert not description.token_gate
    stock = GptOssForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    for layer in range(2):
        expert = selection.ranking().used[layer][0]
        experts = stock.model.layers[layer].mlp.experts
        gate_up = experts.gate_up_proj[expert].T
        expected = torch.cat([gate_up[0::2], gate_up[1::2]]).bfloat16()
        assert torch.equal(tensors[f"layers.{layer}.gate_up_proj.weight"], expected)
        assert torch.equal(tensors[f"layers.{layer}.down_proj.weight"], experts.down_proj[expert].T.bfloat16())
        assert tensors[f"layers.{layer}.scale"].item() == pytest.approx(0.2)


@pytest.mark.parametrize("method", ["pca_topK", "reap_top3", "top4_average"])
def test_means_are_of_the_experts_the_method_names(converted, method):
    config, _, tensors, selection = converted(initialisation=method, dtype="float32")
    ranking = selection.ranking()
    wanted = {
        "pca_topK": selection.experts(1)[:4],
        "reap_top3": ranking.reap[1][:3],
        "top4_average": ranking.used[1][:4],
    }
    stock = GptOssForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).model.layers[1].mlp.experts
    expected = stock.down_proj[list(wanted[method])].mean(0).T
    assert torch.allclose(tensors["layers.1.down_proj.weight"], expected, atol=1e-6)


def test_aligned_mean_keeps_the_neuron_order_of_the_best_expert(converted):
    config, _, tensors, selection = converted(initialisation="aligned_top1", dtype="float32")
    with CheckpointReader(config.model.path) as reader:
        best = FAMILIES["gpt_oss"].read_expert(reader, 0, selection.experts(0)[0])
    assert torch.equal(tensors["layers.0.down_proj.weight"], best.down)


def test_aligned_mean_is_nearer_to_its_experts_than_the_plain_mean(converted):
    """Least squares: the best-matching mean cannot be smaller than one of neurons in arbitrary order."""
    norms = {}
    for method in ("aligned_topK", "pca_topK"):
        _, _, tensors, _ = converted(initialisation=method, dtype="float32")
        norms[method] = sum(float(tensors[f"layers.0.{name}"].square().sum()) for name in MLP)
    assert norms["aligned_topK"] > 1.2 * norms["pca_topK"]


def test_random_depends_on_the_seed_only(converted):
    name = "layers.1.gate_up_proj.weight"
    first, second = (converted(initialisation="random", width=96)[2][name] for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (192, 64)


@pytest.mark.parametrize("width", [40, 96])
@pytest.mark.parametrize("method", ["top1", "pca_topK", "aligned_topK", "reap_topK"])
def test_copies_and_means_take_any_width(converted, method, width):
    _, description, tensors, _ = converted(initialisation=method, width=width)
    assert description.width == width
    assert tensors["layers.0.down_proj.weight"].shape == (64, width)
    assert tensors["layers.0.gate_up_proj.weight"].shape == (2 * width, 64)
    assert tensors["layers.0.down_proj.weight"].any()


def test_storage_type_and_shards_are_as_configured(converted):
    config, description, tensors, _ = converted(dtype="float32", shard_bytes=20_000)
    assert description.dtype == "float32"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    files = {path.name for path in RunLayout(config.run.directory).initial_overlay.iterdir()}
    assert "overlay.safetensors.index.json" in files
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    _, _, tensors, _ = converted()
    assert {tensor.dtype for name, tensor in tensors.items() if "scale" not in name} == {torch.bfloat16}


def test_the_record_says_what_each_layer_was_made_from(converted):
    config, description, _, selection = converted(initialisation="pca_top2")
    record = json.loads((RunLayout(config.run.directory).conversion).read_text())
    assert record["parameters"] == description.parameters
    assert [layer["experts"] for layer in record["layers"]] == [selection.experts(layer)[:2] for layer in range(2)]
    assert all(layer["bytes_read"] > 0 and layer["explained_variance"] is None for layer in record["layers"])


def test_the_base_is_not_touched_and_a_full_disk_leaves_the_old_overlay(
    converted, ranked_run, micro_model, monkeypatch
):
    before = base_digest(micro_model)
    config, _, _, _ = converted(initialisation="zero")
    layout = RunLayout(config.run.directory)
    old = base_digest(layout.initial_overlay)

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    config, layout, _ = ranked_run(**{"convert.initialisation": "pca_topK"})
    with pytest.raises(StorageError, match="disk is full"):
        convert(config, layout)
    assert base_digest(layout.initial_overlay) == old
    assert [path.name for path in layout.directory.iterdir() if "partial" in path.name] == []
    assert base_digest(micro_model) == before


def test_damaged_experts_leave_nothing_half_written(ranked_run, micro_model, monkeypatch):
    config, layout, _ = ranked_run(**{"convert.initialisation": "pca_topK"})

    def fail_in_second_layer(parts, experts):
        if ".layers.1." in parts.down.name:
            raise ModelError("damaged")
        return mean_expert(parts, experts)

    monkeypatch.setattr(initialise, "mean_expert", fail_in_second_layer)
    with pytest.raises(ModelError, match="damaged"):
        convert(config, layout)
    assert not [path for path in layout.directory.iterdir() if "overlay" in path.name]


def test_the_command_imports_no_heavy_library(ranked_run, tmp_path):
    config, layout, _ = ranked_run(**{"convert.initialisation": "pca_topK"})
    save_config(config, tmp_path / "run.yaml")
    program = (
        "import sys; from nexus_ray.cli import run_command; "
        "code = run_command(['convert', sys.argv[1]]); "
        "print(sorted(sys.modules.keys() & {'transformers', 'ray', 'sklearn', 'scipy', 'matplotlib', 'datasets'})); "
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
    assert (layout.initial_overlay / "overlay.safetensors").exists()
