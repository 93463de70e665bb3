"""Invariants of attached shared experts: exact when off, effective when on."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from nexus_ray.checkpoints.overlay import load_overlay, load_overlay_config, save_overlay
from nexus_ray.checkpoints.reader import CheckpointReader, read_model_config
from nexus_ray.config import ModelSection
from nexus_ray.data.packing import Batch, batches, pack
from nexus_ray.errors import ArtefactError, ModelError
from nexus_ray.families import family_of
from nexus_ray.modeling.loading import LoadedModel, activation, load_base, load_student
from nexus_ray.modeling.shared_expert import SharedExpert, SharedExperts, SharedExpertShape


@pytest.fixture(scope="module")
def batch() -> Batch:
    tokens = torch.randint(0, 4096, (90,), generator=torch.Generator().manual_seed(2)).tolist()
    return next(batches(pack([tokens], 48, 4097), 4))


@pytest.fixture(scope="module")
def base(micro_model: Path) -> LoadedModel:
    return load_base(ModelSection(path=micro_model))


@pytest.fixture(scope="module")
def student(micro_model: Path, micro_overlay: Path) -> LoadedModel:
    return load_student(ModelSection(path=micro_model), micro_overlay)


def _stock_logits(path: Path, dtype: str, batch: Batch) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="grouped_mm")
    with torch.no_grad():
        logits: Tensor = model(torch.from_numpy(batch.input_ids).long(), torch.from_numpy(batch.valid).long()).logits
    return logits.float()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantised_logits_equal_stock_transformers(micro_model: Path, batch: Batch, dtype: str) -> None:
    dequantised = load_base(ModelSection(path=micro_model, dtype=dtype, experts="grouped_mm"))
    assert torch.equal(dequantised.forward_batch(batch)[0], _stock_logits(micro_model, dtype, batch))


def test_packed_logits_equal_stock_transformers_to_rounding(micro_model: Path, batch: Batch) -> None:
    def packed(dtype: str) -> Tensor:
        return load_base(ModelSection(path=micro_model, dtype=dtype, experts="packed")).forward_batch(batch)[0]

    exact = _stock_logits(micro_model, "float32", batch)
    torch.testing.assert_close(packed("float32"), exact, rtol=1e-4, atol=1e-4)
    stock_error = (_stock_logits(micro_model, "bfloat16", batch) - exact).norm()
    assert (packed("bfloat16") - exact).norm() <= 1.2 * stock_error


def test_switched_off_equals_base_bit_for_bit(base: LoadedModel, student: LoadedModel, batch: Batch) -> None:
    with student.base():
        off = student.forward_batch(batch)
    for ours, expected in zip(off, base.forward_batch(batch), strict=True):
        assert torch.equal(ours, expected)
    assert not torch.equal(student.forward_batch(batch)[0], off[0])


def test_off_switch_is_restored_after_an_exception(student: LoadedModel, batch: Batch) -> None:
    before = student.forward_batch(batch)[0]
    with pytest.raises(KeyError), student.base():
        raise KeyError
    assert torch.equal(student.forward_batch(batch)[0], before)


def test_off_switch_of_one_thread_does_not_reach_another(student: LoadedModel, batch: Batch) -> None:
    expected = student.forward_batch(batch)[0]
    seen: list[torch.Tensor] = []
    with student.base():
        thread = threading.Thread(target=lambda: seen.append(student.forward_batch(batch)[0]))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], expected)


def test_zero_down_projection_equals_base_bit_for_bit(
    base: LoadedModel, micro_model: Path, micro_overlay: Path, batch: Batch, tmp_path: Path
) -> None:
    description, tensors = load_overlay(micro_overlay, base.fingerprint)
    for name, tensor in tensors.items():
        if "down_proj" in name:
            tensor.zero_()
    save_overlay(tmp_path / "zero", description, tensors)
    zeroed = load_student(ModelSection(path=micro_model), tmp_path / "zero")
    assert torch.equal(zeroed.forward_batch(batch)[0], base.forward_batch(batch)[0])


def test_output_depends_on_every_shared_tensor(student: LoadedModel, batch: Batch) -> None:
    assert student.shared_experts is not None
    before = student.forward_batch(batch)[0]
    for name, parameter in student.shared_experts.named_parameters():
        original = parameter.detach().clone()
        parameter.data += 0.5
        assert not torch.equal(student.forward_batch(batch)[0], before), name
        parameter.data.copy_(original)
    assert torch.equal(student.forward_batch(batch)[0], before)


class _ReplacedBlock(nn.Module):
    """Stands in for what transformers' native MXFP4 path does: a new module takes the MoE block's place."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = block.router, block.experts

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, scores, indices = self.router(flat)
        return self.experts(flat, indices, scores).reshape(hidden_states.shape), scores


def test_attached_after_the_block_was_replaced(student: LoadedModel, micro_model: Path, batch: Batch) -> None:
    replaced = load_base(ModelSection(path=micro_model))
    for layer in replaced.model.model.layers:
        layer.mlp = _ReplacedBlock(layer.mlp)
    assert student.shared_experts is not None
    student.shared_experts.attach(replaced.family.moe_blocks(replaced.model))
    assert torch.allclose(replaced.forward_batch(batch)[0], student.forward_batch(batch)[0])


def test_shared_expert_computes_what_a_routed_expert_does(micro_model: Path) -> None:
    config = read_model_config(micro_model)
    family = family_of(config)
    with CheckpointReader(micro_model) as reader:
        weights = family.read_expert(reader, 1, 3)
    expert = SharedExpert(SharedExpertShape(64, 64, token_gate=False), activation(family, config))
    expert.load_state_dict(
        {
            "gate_up_proj.weight": weights.gate_up,
            "gate_up_proj.bias": weights.gate_up_bias,
            "down_proj.weight": weights.down,
            "down_proj.bias": weights.down_bias,
            "scale": torch.tensor(1.0),
        }
    )
    stock = GptOssForCausalLM.from_pretrained(micro_model, dtype=torch.float32).model.layers[1].mlp.experts
    assert isinstance(stock, GptOssExperts)
    inputs = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)) * 3
    with torch.no_grad():
        expected = stock(inputs, torch.full((20, 1), 3), torch.ones(20, 1))
        assert torch.allclose(expert(inputs), expected, atol=1e-4)


def test_attach_refuses_another_number_of_layers(base: LoadedModel) -> None:
    experts = SharedExperts(3, SharedExpertShape(64, 64, False), lambda gate, up: gate * up)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        experts.attach(base.family.moe_blocks(base.model))


def test_overlay_of_another_base_is_refused(micro_model: Path, micro_overlay: Path, tmp_path: Path) -> None:
    description, tensors = load_overlay(micro_overlay, load_overlay_config(micro_overlay).base_fingerprint)
    save_overlay(tmp_path / "other", description.model_copy(update={"base_fingerprint": "0" * 64}), tensors)
    with pytest.raises(ArtefactError, match="made for the base 000000"):
        load_student(ModelSection(path=micro_model), tmp_path / "other")


def test_tokenizer_larger_than_the_model_is_refused(micro_model: Path, tmp_path: Path) -> None:
    for file in micro_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (tmp_path / "config.json").read_text().replace('"vocab_size": 4117', '"vocab_size": 4000')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError):
        load_base(ModelSection(path=tmp_path))
