"""Trained routers: the base's bits while they are zero or off, else what a plain router with their sum computes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_ray.checkpoints.inspect import identity
from nexus_ray.checkpoints.overlay import (
    OverlayConfig,
    add_routers,
    load_overlay,
    load_overlay_config,
    overlay_specs,
    save_overlay,
)
from nexus_ray.config import Config, ModelSection
from nexus_ray.errors import ArtefactError
from nexus_ray.modeling.loading import LoadedModel, load_base, load_student
from nexus_ray.modeling.trained import is_trained, trained_parameters
from nexus_ray.planning.sizes import read_sizes
from nexus_ray.planning.weights import overlay_size

EXPERTS, HIDDEN, TOP_K = 8, 64, 2
IMPLEMENTATIONS = ["packed", "eager", "grouped_mm"]
IDS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(3))
VALID = torch.ones_like(IDS, dtype=torch.bool)


def _section(path: Path, **values: Any) -> ModelSection:
    return ModelSection.model_validate({"path": path, "device": "cpu"} | values)


def _moved(student: LoadedModel, kind: str = "all", size: float = 0.3) -> LoadedModel:
    """The student with random differences of its routers."""
    student.train_routers(kind)
    assert student.routers is not None
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in student.routers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return student


@torch.no_grad()
def _outputs(loaded: LoadedModel) -> tuple[Tensor, Tensor]:
    return loaded.forward(IDS, VALID)


def _equal(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> bool:
    return all(map(torch.equal, left, right))


@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_differences_and_switched_off_ones_leave_the_base_bit_for_bit(
    micro_model: Path, micro_overlay: Path, experts: str, dtype: str
) -> None:
    section = _section(micro_model, experts=experts, dtype=dtype)
    base, student = load_base(section), load_student(section, micro_overlay)
    before = _outputs(student)
    student.train_routers("all")
    assert _equal(_outputs(student), before), "zero differences"
    _moved(student)
    assert not torch.equal(_outputs(student)[1], before[1])
    with student.base():
        assert _equal(_outputs(student), _outputs(base)), "switched off"


class _PlainRouter(nn.Module):
    """Written without a look at the model: scores by sorting, the softmax by its definition."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = (inputs.unsqueeze(1) * self.weight).sum(-1) + self.bias
        chosen = logits.argsort(dim=-1, descending=True)[:, :TOP_K]
        odds = (logits.gather(1, chosen) - logits.max(dim=-1, keepdim=True).values).exp()
        return logits, odds / odds.sum(dim=-1, keepdim=True), chosen


def _with_plain_routers(section: ModelSection, overlay: Path, student: LoadedModel) -> LoadedModel:
    """The overlay's student, whose routers are plain ones with the sum of the base's parameters and `student`'s."""
    plain = load_student(section, overlay)
    assert student.routers is not None
    for layer, trained in zip(plain.family.layers(plain.model), student.routers.routers, strict=True):
        block = layer.get_submodule("mlp")
        weight = block.router.weight if trained.weight is None else block.router.weight + trained.weight
        block.router = _PlainRouter(weight.detach(), (block.router.bias + trained.bias).detach())
    return plain


@pytest.mark.parametrize("experts", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["bias", "all"])
def test_differences_route_as_a_plain_router_with_the_sum_does(
    micro_model: Path, micro_overlay: Path, experts: str, kind: str
) -> None:
    section = _section(micro_model, experts=experts, dtype="float32")
    unmoved = _outputs(load_student(section, micro_overlay))[1]
    student = _moved(load_student(section, micro_overlay), kind)
    expected = _outputs(_with_plain_routers(section, micro_overlay, student))
    found = _outputs(student)
    assert not torch.equal(found[1].topk(TOP_K).indices, unmoved.topk(TOP_K).indices), "other experts are chosen"
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("experts", ["packed", "eager"])
def test_gradients_are_those_of_a_plain_router(micro_model: Path, micro_overlay: Path, experts: str) -> None:
    section = _section(micro_model, experts=experts, dtype="float32")
    student = _moved(load_student(section, micro_overlay))
    plain = _with_plain_routers(section, micro_overlay, student)
    trained = trained_parameters(student, "all")
    gradients = _gradients(student, [trained[f"routers.{layer}.{name}"] for layer, name in _NAMES])
    routers = plain.family.routers(plain.model)
    expected = _gradients(plain, [routers[layer].get_parameter(name) for layer, name in _NAMES])
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


_NAMES = [(layer, name) for layer in range(2) for name in ("weight", "bias")]


def _gradients(loaded: LoadedModel, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(_loss(loaded), parameters)


def _loss(loaded: LoadedModel) -> Tensor:
    logits, routers = loaded.forward(IDS, VALID)
    return logits.log_softmax(-1)[..., 7].mean() + routers.logsumexp(-1).square().mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_that_run_again_for_backward_give_the_same_gradients(
    micro_model: Path, micro_overlay: Path, dtype: str
) -> None:
    student = _moved(load_student(_section(micro_model, dtype=dtype), micro_overlay))
    parameters = list(trained_parameters(student, "all").values())
    expected = _gradients(student, parameters)
    student.checkpoint_layers()
    loss = _loss(student)
    with student.base(), torch.no_grad():
        student.hidden_states(IDS, VALID)
    with student.base():  # whatever is switched when backward comes
        found = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, found, expected))


def test_a_deep_copy_has_routers_of_its_own(micro_model: Path, micro_overlay: Path) -> None:
    student = _moved(load_student(_section(micro_model), micro_overlay))
    before = _outputs(student)
    copied = copy.deepcopy((student.model, student.shared_experts, student.routers))
    twin = copy.copy(student)
    twin.model, twin.shared_experts, twin.routers = copied
    assert _equal(_outputs(twin), before)
    _moved(twin, size=0.5)
    assert not torch.equal(_outputs(twin)[1], before[1])
    assert _equal(_outputs(student), before)


def test_a_recorder_that_was_there_first_sees_the_students_logits(micro_model: Path, micro_overlay: Path) -> None:
    student = load_student(_section(micro_model), micro_overlay)
    seen: list[Tensor] = []
    student.family.routers(student.model)[0].register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
    _moved(student)
    recorded = _outputs(student)[1][:, :, 0]
    assert torch.equal(seen[-1].view_as(recorded), recorded)


@pytest.mark.parametrize("kind", ["bias", "all"])
def test_an_overlay_keeps_the_differences_to_the_bit(
    micro_model: Path, micro_overlay: Path, tmp_path: Path, kind: str
) -> None:
    student = _moved(load_student(_section(micro_model), micro_overlay), kind)
    _save(student, tmp_path / "trained", dtype="bfloat16")
    stored = load_overlay(tmp_path / "trained", student.fingerprint)[1]
    assert student.routers is not None
    parameters = dict(student.routers.named_parameters())
    assert {name for name in stored if name.startswith("routers.")} == set(parameters)
    for name, parameter in parameters.items():
        assert stored[name].dtype == torch.float32
        assert torch.equal(stored[name], parameter)
    again = load_student(_section(micro_model), tmp_path / "trained")
    assert again.overlay is not None
    assert (again.overlay.routers, again.overlay.experts) == (kind, EXPERTS)
    assert not any(parameter.requires_grad for parameter in again.routers.parameters())
    router_size = 2 * EXPERTS * (1 + (HIDDEN if kind == "all" else 0))
    assert again.overlay.parameters == load_overlay_config(micro_overlay).parameters + router_size
    kind_text = "biases of routers among them" if kind == "bias" else "(routers among them)"
    assert kind_text in identity(tmp_path / "trained")[0]


def _save(student: LoadedModel, directory: Path, dtype: str = "float32") -> OverlayConfig:
    assert student.overlay is not None
    description = student.overlay.model_copy(update={"dtype": dtype})
    assert student.shared_experts is not None
    assert student.routers is not None
    save_overlay(directory, description, {**student.shared_experts.state_dict(), **student.routers.state_dict()})
    return description


def test_the_loaded_student_computes_what_the_saved_one_did(
    micro_model: Path, micro_overlay: Path, tmp_path: Path
) -> None:
    student = _moved(load_student(_section(micro_model), micro_overlay))
    _save(student, tmp_path / "trained")
    assert _equal(_outputs(load_student(_section(micro_model), tmp_path / "trained")), _outputs(student))


def test_an_overlay_from_before_routers_could_be_trained_loads(
    micro_model: Path, micro_overlay: Path, tmp_path: Path
) -> None:
    for file in micro_overlay.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "overlay_config.json").read_text())
    for name in ("routers", "experts"):
        del values[name]
    (tmp_path / "overlay_config.json").write_text(json.dumps(values))
    student = load_student(_section(micro_model), tmp_path)
    assert student.routers is None
    assert _equal(_outputs(student), _outputs(load_student(_section(micro_model), micro_overlay)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": None}, "how many `experts`"),
        ({"experts": 4}, r"routers\.0\.bias of the overlay .* is .* \[8\], its description says .* \[4\]"),
        ({"routers": "all"}, r"lacks routers\.0\.weight, which its description promises"),
        ({"routers": "none"}, r"has routers\.0\.bias, which its description does not have"),
        ({"routers": "some"}, "routers"),
    ],
)
def test_an_overlay_that_contradicts_its_description_is_refused(
    micro_model: Path, micro_overlay: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    _save(_moved(load_student(_section(micro_model), micro_overlay), "bias"), tmp_path / "trained")
    path = tmp_path / "trained" / "overlay_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ArtefactError, match=message):
        load_student(_section(micro_model), tmp_path / "trained")


def test_routers_of_another_number_of_experts_are_refused(
    micro_model: Path, micro_overlay: Path, tmp_path: Path
) -> None:
    description, tensors = load_overlay(micro_overlay, load_overlay_config(micro_overlay).base_fingerprint)
    save_overlay(tmp_path / "odd", *add_routers(description, tensors, "bias", 5))
    with pytest.raises(ArtefactError, match=r"for routers of \[5, 64\] weights, model\.path has \[8, 64\]"):
        load_student(_section(micro_model), tmp_path / "odd")


def test_training_more_of_a_router_keeps_what_it_has(micro_model: Path, micro_overlay: Path) -> None:
    student = _moved(load_student(_section(micro_model), micro_overlay), "bias")
    before = _outputs(student)
    student.train_routers("all")
    assert set(trained_parameters(student, "all")) >= {"routers.0.weight", "routers.0.bias"}
    assert _equal(_outputs(student), before)
    student.train_routers("none")
    assert student.overlay is not None
    assert student.overlay.routers == "all"
    assert _equal(_outputs(student), before), "frozen, and still the student's"


def test_zero_differences_are_added_to_what_an_overlay_has(micro_overlay: Path) -> None:
    description, tensors = load_overlay(micro_overlay, load_overlay_config(micro_overlay).base_fingerprint)
    with_bias = add_routers(description, tensors, "bias", EXPERTS)
    with_bias[1]["routers.1.bias"] += 1
    wider, all_tensors = add_routers(*with_bias, "all", EXPERTS)
    assert {name: tuple(tensor.shape) for name, tensor in all_tensors.items()} == {
        spec.name: spec.shape for spec in overlay_specs(wider)
    }
    assert all_tensors["routers.1.bias"].eq(1).all()
    assert not all_tensors["routers.1.weight"].any()
    assert add_routers(wider, all_tensors, "none", EXPERTS) == (wider, all_tensors)


@pytest.mark.parametrize(
    ("routers", "learn_scale", "expected"),
    [
        ("none", False, {"layers.0.down_proj.bias"}),
        ("none", True, {"layers.0.down_proj.bias", "layers.0.scale"}),
        ("bias", False, {"layers.0.down_proj.bias", "routers.0.bias"}),
        ("all", False, {"layers.0.down_proj.bias", "routers.0.bias", "routers.0.weight"}),
    ],
)
def test_what_is_trained(routers: Any, learn_scale: bool, expected: set[str]) -> None:
    names = ("layers.0.down_proj.bias", "layers.0.scale", "routers.0.bias", "routers.0.weight")
    assert {name for name in names if is_trained(name, learn_scale=learn_scale, routers=routers)} == expected


@pytest.mark.parametrize("routers", ["none", "bias", "all"])
def test_the_plan_counts_what_training_trains_and_writes(
    micro_model: Path, micro_overlay: Path, micro_config: Callable[..., Config], tmp_path: Path, routers: Any
) -> None:
    settings = {"convert.token_gate": True, "convert.dtype": "float32", "train.routers": {"train": routers}}
    planned = overlay_size(read_sizes(micro_model), micro_config(tmp_path, **settings))
    student = load_student(_section(micro_model), micro_overlay)
    student.train_routers(routers)
    trained = trained_parameters(student, routers)
    assert planned.trained == sum(parameter.numel() for parameter in trained.values())
    assert student.overlay is not None
    assert planned.parameters == student.overlay.parameters
    assert [name for name, p in student.model.named_parameters() if p.requires_grad] == []
