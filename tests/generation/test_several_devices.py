"""A served model may be spread over several devices; its key-value cache is on the first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.config import ModelSection
from nexus_ray.families import family_of
from nexus_ray.generation.batching.attention import Plan, attention
from nexus_ray.generation.batching.engine import BatchingEngine
from nexus_ray.generation.batching.paged import BatchLimits
from nexus_ray.generation.request import TokenRequest
from nexus_ray.generation.serving import cache_bytes
from nexus_ray.modeling.loading import load_base, load_student
from nexus_ray.modeling.placement import split_layers
from nexus_ray.modeling.weights import build_model

PROMPT = tuple(range(100, 140))


def test_answers_are_those_of_one_device(micro_model, micro_overlay):
    """Both devices are the CPU: what is checked is that the hooks between groups of layers change nothing."""
    section = ModelSection(path=micro_model, dtype="float32")
    spread = load_base(section, [torch.device("cpu"), torch.device("cpu", 0)])
    engine = BatchingEngine(spread, {"student": micro_overlay}, BatchLimits(cache_tokens=1024))
    try:
        for name, loaded in (("base", load_base(section)), ("student", load_student(section, micro_overlay))):
            expected = loaded.model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)
            answer = engine.submit(TokenRequest(PROMPT, name, 12, frozenset(), temperature=0.0))
            assert [choice.id for choice in answer] == expected[0, len(PROMPT) :].tolist()
    finally:
        engine.close()


class _Cache:
    """Keys and values of one layer, all on one device; refuses those of another, as memory would."""

    def __init__(self, device: str, kind: str) -> None:
        self.device = torch.device(device)
        self.layer_to_allocator = {0: SimpleNamespace(layer_type=kind)}

    def update(self, key_states, value_states, layer_idx, kwargs):
        assert {key_states.device, value_states.device, *(place.device for place in kwargs["read_index"])} == {
            self.device
        }
        return key_states, value_states


class _Indexing(TorchFunctionMode):
    """Indexing by functions: for `tensor[...]` a torch without CUDA refuses even fake tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            return _entry(*args)
        if function is torch.Tensor.__setitem__:
            target, place, values = args
            if isinstance(place, slice):
                place = torch.arange(*place.indices(len(target)), device=target.device)
            return target.index_copy_(0, place, values)
        return function(*args, **(kwargs or {}))


def _entry(tensor, places):
    dimension = 0
    for place in places if isinstance(places, tuple) else (places,):
        if place is None:
            tensor = tensor.unsqueeze(dimension)
        elif isinstance(place, int):
            tensor = tensor.select(dimension, place)
            continue
        else:
            start, stop, _ = place.indices(tensor.shape[dimension])
            tensor = tensor.narrow(dimension, start, stop - start)
        dimension += 1
    return tensor


@pytest.mark.parametrize("layer_device", ["cuda:0", "cuda:1"])
def test_a_layer_of_any_device_attends_where_the_cache_is_and_gets_the_result_back(layer_device):
    """With fake tensors, which know their device and refuse to mix two of them."""
    with FakeTensorMode(), _Indexing():
        plan = Plan.of([0, 1, 2, 7], [0, 5, 9, 14], None, torch.device("cuda:0"))
        module = SimpleNamespace(layer_idx=0, sinks=torch.empty(4, device=layer_device))
        query = torch.empty(1, 4, 7, 8, device=layer_device)
        key, value = (torch.empty(1, 2, 14, 8, device=layer_device) for _ in range(2))
        output, _ = attention(
            module,
            query,
            key,
            value,
            None,
            cache=_Cache("cuda:0", "full_attention"),
            plans={"full_attention": plan},
            scaling=0.3,
            read_index=[torch.empty(14, device=layer_device, dtype=torch.long)],
        )
    assert output.device == torch.device(layer_device)
    assert output.shape == (1, 7, 4, 8)


def test_the_fake_tensors_would_notice_a_mixture():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="same device"):
        torch.empty(3, device="cuda:0") + torch.empty(3, device="cuda:1")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_room_kept_for_the_cache_is_what_it_takes(micro_config, tmp_path, dtype):
    config = micro_config(tmp_path, **{"model.dtype": dtype, "serve.cache_tokens": 8192})
    engine = BatchingEngine(load_base(config.model), {}, BatchLimits(cache_tokens=config.serve.cache_tokens))
    try:
        list(engine.submit(TokenRequest(PROMPT, "base", 1, frozenset())))
        taken = engine._manager.batch_processor.cache.cache_tensor.nbytes
    finally:
        engine.close()
    assert taken == pytest.approx(cache_bytes(config), rel=0.05)


def test_the_first_device_gets_fewer_layers_when_it_holds_a_cache_too(micro_model, monkeypatch):
    config, first_bytes = read_model_config(micro_model), []

    def split(sizes, first, devices):
        first_bytes.append(first)
        return split_layers(sizes, first, devices)

    monkeypatch.setattr("nexus_ray.modeling.weights.split_layers", split)
    two = [torch.device("cpu"), torch.device("meta")]
    for reserved in (0, 12_345):
        build_model(
            micro_model,
            config,
            family_of(config),
            experts="packed",
            dtype=torch.float32,
            devices=two,
            reserved=reserved,
        )
    assert first_bytes[1] == first_bytes[0] + 12_345
