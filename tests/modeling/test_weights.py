"""Building a model from a checkpoint: everything from the file, nothing but the file, and clear refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nexus_ray.config import ModelSection
from nexus_ray.errors import ModelError
from nexus_ray.modeling.loading import load_base
from nexus_ray.storage import sha256_file

_SCALES = "model.layers.1.mlp.experts.down_proj_scales"
_BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"


@pytest.fixture
def changed(micro_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies the micro model with changed tensors and configuration."""

    def change(edit: Callable[[dict[str, Tensor]], None], **config: object) -> Path:
        copy = tmp_path / "copy"
        shutil.copytree(micro_model, copy)
        tensors = load_file(copy / "model.safetensors")
        edit(tensors)
        save_file(tensors, copy / "model.safetensors")
        values = json.loads((copy / "config.json").read_text()) | config
        (copy / "config.json").write_text(json.dumps(values))
        return copy

    return change


def delete(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def replace(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(name, make(tensors[name]).contiguous())


@pytest.mark.parametrize("experts", ["packed", "eager"])
@pytest.mark.parametrize("name", [_SCALES, _BLOCKS, "model.norm.weight", "model.layers.0.mlp.router.bias"])
def test_a_missing_tensor_is_named(changed: Callable[..., Path], experts: str, name: str) -> None:
    with pytest.raises(ModelError, match=re.escape(re.sub("_(blocks|scales)$", "", name))):
        load_base(ModelSection(path=changed(delete(name)), experts=experts))


def test_an_unexpected_tensor_is_named(changed: Callable[..., Path]) -> None:
    path = changed(lambda tensors: tensors.__setitem__("model.extra.weight", torch.zeros(3)))
    with pytest.raises(ModelError, match=r"unexpected model\.extra\.weight"):
        load_base(ModelSection(path=path))


@pytest.mark.parametrize("experts", ["packed", "eager"])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        (_SCALES, lambda tensor: tensor[:4]),
        (_BLOCKS, lambda tensor: tensor[:, :, :1]),
        ("model.norm.weight", lambda tensor: tensor[:3]),
        ("model.norm.weight", lambda tensor: tensor.to(torch.int32)),
    ],
)
def test_a_wrong_shape_or_type_is_named(
    changed: Callable[..., Path], experts: str, name: str, make: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(ModelError, match=re.escape(re.sub("_(blocks|scales)$", "", name))):
        load_base(ModelSection(path=changed(replace(name, make)), experts=experts))


@pytest.mark.parametrize("experts", ["packed", "eager"])
def test_a_scale_that_means_nan_is_refused(changed: Callable[..., Path], experts: str) -> None:
    path = changed(replace(_SCALES, lambda scales: scales.index_fill(0, torch.tensor([2]), 255)))
    with pytest.raises(ModelError, match=r"down_proj_scales.*NaN"):
        load_base(ModelSection(path=path, experts=experts))


def test_tied_embeddings_need_no_head(changed: Callable[..., Path]) -> None:
    model = load_base(ModelSection(path=changed(delete("lm_head.weight"), tie_word_embeddings=True))).model
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_packed_weights_stay_bytes_and_everything_else_gets_the_type(
    micro_model: Path, dtype: str, expected: torch.dtype
) -> None:
    model = load_base(ModelSection(path=micro_model, dtype=dtype)).model
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.uint8 if name.endswith(("_blocks", "_scales")) else expected)
        assert not parameter.requires_grad
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_computed_buffers_are_those_of_transformers(micro_model: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(micro_model)
    mine = dict(load_base(ModelSection(path=micro_model)).model.named_buffers())
    for name, buffer in stock.named_buffers():
        assert torch.equal(mine[name], buffer), name


def test_plain_checkpoint_goes_through_the_same_experts(micro_model: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(micro_model, tmp_path / "plain"))
    save_file(
        AutoModelForCausalLM.from_pretrained(micro_model, dtype=torch.bfloat16).state_dict(),
        plain / "model.safetensors",
    )
    input_ids = torch.arange(60).view(2, 30)
    logits = [
        load_base(ModelSection(path=path, dtype="float32")).model(input_ids=input_ids).logits
        for path in (micro_model, plain)
    ]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_writing_to_a_loaded_model_never_reaches_the_file(micro_model: Path) -> None:
    before = sha256_file(micro_model / "model.safetensors")
    model = load_base(ModelSection(path=micro_model, dtype="bfloat16")).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert sha256_file(micro_model / "model.safetensors") == before
