"""Gradient checkpointing: the same bits, less memory, and nothing else about the model changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GptOssForCausalLM

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import OverlayConfig, save_overlay
from nexus_ray.checkpoints.quantised_export import export_mxfp4
from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.config import ArchitectureSection, ModelSection
from nexus_ray.errors import ModelError
from nexus_ray.families import family_of
from nexus_ray.modeling.loading import LoadedModel, activation, build_shared_experts, load_student
from nexus_ray.modeling.recomputation import require_checkpointing
from nexus_ray.pretraining.model import build_config

LAYERS, HIDDEN, EXPERTS = 4, 64, 8
SHAPE = (2, 48)  # sequences, tokens


@pytest.fixture(scope="module")
def model_and_overlay(tmp_path_factory: pytest.TempPathFactory, tokenizer_directory: Path) -> tuple[Path, Path]:
    """A model of four layers, alternating between sliding and full attention, and an overlay that matters."""
    place = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    sizes = ArchitectureSection(
        layers=LAYERS,
        hidden_size=HIDDEN,
        intermediate_size=64,
        experts=EXPERTS,
        experts_per_token=2,
        attention_heads=2,
        key_value_heads=1,
    )
    architecture = build_config(sizes, AutoTokenizer.from_pretrained(tokenizer_directory))
    architecture.initializer_range, architecture.sliding_window = 0.2, 16
    export_mxfp4(GptOssForCausalLM(architecture), tokenizer_directory, place / "model")
    description = OverlayConfig(
        base_fingerprint=fingerprint(place / "model"),
        model_type="gpt_oss",
        layers=LAYERS,
        hidden_size=HIDDEN,
        width=32,
        token_gate=True,
        scale=0.5,
        learn_scale=True,
        initialisation="random",
        dtype="float32",
    )
    config = read_model_config(place / "model")
    experts = build_shared_experts(description, activation(family_of(config), config))
    tensors = {name: torch.randn_like(value) * 0.2 for name, value in experts.state_dict().items()}
    save_overlay(place / "overlay", description, tensors)
    return place / "model", place / "overlay"


MakeStudent = Callable[..., LoadedModel]


@pytest.fixture
def make_student(model_and_overlay: tuple[Path, Path]) -> MakeStudent:
    """A function (checkpointing, dtype, experts) -> a student whose shared experts are trained."""

    def make(*, checkpointing: bool, dtype: str = "float32", experts: str = "packed") -> LoadedModel:
        model, overlay = model_and_overlay
        section = ModelSection.model_validate({"path": model, "device": "cpu", "dtype": dtype, "experts": experts})
        student = load_student(section, overlay)
        assert student.shared_experts is not None
        student.shared_experts.requires_grad_(True)
        if checkpointing:
            student.checkpoint_layers()
        return student

    return make


def _ids(seed: int) -> Tensor:
    return torch.randint(0, 4000, SHAPE, generator=torch.Generator().manual_seed(seed))


def _run(student: LoadedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[0, -9:] = False
    return student.hidden_states(ids, valid)


def _gradients(module: nn.Module | None) -> dict[str, Tensor]:
    assert module is not None
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def _distil(student: LoadedModel) -> list[Tensor]:
    """Two micro-batches with an online teacher between forward and backward; all outputs."""
    outputs = []
    for seed in (1, 2):
        ids = _ids(seed)
        hidden, routers = _run(student, ids)
        with torch.no_grad(), student.base():
            teacher, teacher_routers = _run(student, ids)
        loss = (hidden - teacher).float().square().sum() + (routers - teacher_routers).float().square().sum()
        loss.backward()
        outputs += [hidden.detach(), routers.detach(), teacher, teacher_routers]
    return outputs


@contextmanager
def _counting(modules: list[nn.Module]) -> Iterator[list[int]]:
    counts = [0] * len(modules)

    def hook(index: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            counts[index] += 1

        return count

    handles = [module.register_forward_pre_hook(hook(index)) for index, module in enumerate(modules)]
    yield counts
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("experts", ["packed", "grouped_mm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_and_gradients_are_the_same_bits(make_student: MakeStudent, dtype: str, experts: str) -> None:
    plain, checkpointed = (make_student(checkpointing=on, dtype=dtype, experts=experts) for on in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(_distil(plain), _distil(checkpointed), strict=True))
    expected, found = _gradients(plain.shared_experts), _gradients(checkpointed.shared_experts)
    assert len(expected) == 7 * LAYERS
    assert all(gradient.any() for gradient in expected.values())
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_trained_routers_get_the_same_gradients(make_student: MakeStudent) -> None:
    plain, checkpointed = (make_student(checkpointing=on) for on in (False, True))
    for student in (plain, checkpointed):
        student.train_routers("all")
        assert student.routers is not None
        student.routers.requires_grad_(True)
        _distil(student)
    expected, found = _gradients(plain.routers), _gradients(checkpointed.routers)
    assert len(expected) == 2 * LAYERS
    assert all(gradient.any() and torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_only_each_layers_input_is_kept(make_student: MakeStudent, dtype: str, itemsize: int) -> None:
    """Beside the inputs there is what the norm after the last layer keeps: its float32 input and one scale a token."""

    def saved(student: LoadedModel) -> int:
        assert student.shared_experts is not None
        weights = {p.data_ptr() for module in (student.model, student.shared_experts) for p in module.parameters()}
        storages: dict[int, int] = {}
        keep = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in weights:
                keep.append(tensor)  # so that no storage takes the place of another
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _run(student, _ids(1))
        return sum(storages.values())

    tokens = SHAPE[0] * SHAPE[1]
    inputs = LAYERS * tokens * HIDDEN * itemsize
    last_norm = tokens * (HIDDEN + 1) * 4
    kept = saved(make_student(checkpointing=True, dtype=dtype))
    assert kept == inputs + last_norm
    assert kept < saved(make_student(checkpointing=False, dtype=dtype)) / 5


def test_every_layer_runs_once_more_for_the_backward_pass(make_student: MakeStudent) -> None:
    student = make_student(checkpointing=True)
    with _counting(student.family.moe_blocks(student.model)) as counts:
        hidden, _ = _run(student, _ids(1))
        assert counts == [1] * LAYERS
        hidden.float().square().sum().backward()
    assert counts == [2] * LAYERS


def test_passes_without_gradients_compute_nothing_twice_and_generation_keeps_its_cache(
    make_student: MakeStudent,
) -> None:
    plain, checkpointed = (make_student(checkpointing=on) for on in (False, True))
    prompt = _ids(3)[:1, :8]
    texts = []
    for student in (plain, checkpointed):
        lengths: list[int] = []
        layer = student.family.layers(student.model)[1]
        hook = layer.register_forward_pre_hook(lambda _m, args, seen=lengths: seen.append(args[0].shape[1]))
        texts.append(student.model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0))
        hook.remove()
        assert lengths == [8, 1, 1, 1, 1, 1]
    assert torch.equal(*texts)


def test_all_modules_stay_in_evaluation_mode(make_student: MakeStudent) -> None:
    """Dropout inside a layer would show in the outputs."""
    student, plain = make_student(checkpointing=True), make_student(checkpointing=False)
    for layer in student.family.layers(student.model):
        layer.get_submodule("self_attn").attention_dropout = 0.9  # type: ignore[assignment]
    hidden, routers = _run(student, _ids(1))
    assert not any(module.training for module in student.model.modules())
    expected = _run(plain, _ids(1))
    assert torch.equal(hidden, expected[0])
    assert torch.equal(routers, expected[1])
    hidden.sum().backward()
    assert not any(module.training for module in student.model.modules())


def test_router_logits_are_recorded_once_even_where_backward_runs_meanwhile(make_student: MakeStudent) -> None:
    student = make_student(checkpointing=True)
    with student.recording_routers() as records:
        hidden, routers = _run(student, _ids(1))
        (hidden.sum() + routers.sum()).backward()
    assert len(records) == LAYERS
    assert torch.equal(torch.stack(records, 1).view(routers.shape), routers)


@pytest.mark.parametrize("off", [False, True])
@pytest.mark.parametrize("in_thread", [False, True])
def test_layers_run_again_as_they_ran_whatever_holds_where_backward_runs(
    make_student: MakeStudent, off: bool, in_thread: bool
) -> None:
    """On a GPU backward runs in a thread of autograd. Here a base parameter is trained, to have gradients when off."""
    gradients = []
    for checkpointing in (False, True):
        student = make_student(checkpointing=checkpointing)
        trained = student.family.layers(student.model)[0].get_submodule("input_layernorm").weight
        assert isinstance(trained, nn.Parameter)
        trained.requires_grad_(True)
        with student.base() if off else nullcontext():
            loss = _run(student, _ids(1))[0].float().square().sum()
        with nullcontext() if off else student.base():
            worker = threading.Thread(target=loss.backward)
            if in_thread:
                worker.start()
                worker.join()
            else:
                loss.backward()
        assert trained.grad is not None
        gradients.append(trained.grad)
        assert bool(_gradients(student.shared_experts)) is not off
    assert gradients[0].any()
    assert torch.equal(*gradients)


def test_backward_can_run_twice(make_student: MakeStudent) -> None:
    student = make_student(checkpointing=True)
    loss = _run(student, _ids(1))[0].sum()
    loss.backward(retain_graph=True)
    once = {name: gradient.clone() for name, gradient in _gradients(student.shared_experts).items()}
    loss.backward()
    assert all(torch.equal(gradient, 2 * once[name]) for name, gradient in _gradients(student.shared_experts).items())


def test_a_model_that_cannot_do_it_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="Linear does not support gradient checkpointing"):
        require_checkpointing([nn.Linear(2, 2)])
