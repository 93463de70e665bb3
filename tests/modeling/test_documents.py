"""Attention within documents: packed together they give what each gives alone, by transformers' own forward pass."""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config

from nexus_ray.config import ModelSection
from nexus_ray.data.packing import separator_id
from nexus_ray.modeling.documents import document_positions
from nexus_ray.modeling.loading import LoadedModel, load_base, load_student

WINDOW = 128
LONGER = WINDOW + 37
LENGTH = 256


@pytest.fixture(scope="module")
def reference(micro_model: Path) -> torch.nn.Module:
    """The same weights, unpacked by transformers, in float64."""
    model = AutoModelForCausalLM.from_pretrained(
        micro_model,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    )
    assert set(model.config.layer_types) == {"full_attention", "sliding_attention"}
    assert model.config.sliding_window == WINDOW
    return model.double().eval()


def load(micro_model: Path, experts: str = "packed", attention: str = "document") -> LoadedModel:
    return load_base(ModelSection(path=micro_model, device="cpu", experts=experts, attention=attention))


def random_text(tokens: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 1000, tokens).tolist()


def packed(separator: int) -> tuple[Tensor, Tensor, list[list[tuple[int, int]]]]:
    """Two sequences, what of them is valid, and where the documents of each are; the second begins inside one."""
    rows = [
        [[separator, *random_text(LONGER, 0)], [separator, *random_text(40, 1)], [separator], [separator, 5]],
        [random_text(50, 2), [separator, *random_text(LONGER, 3)]],
    ]
    ids = torch.full((2, LENGTH), separator)
    valid = torch.zeros(2, LENGTH, dtype=torch.bool)
    places = []
    for row, documents in enumerate(rows):
        ends = np.cumsum([0, *map(len, documents)]).tolist()
        ids[row, : ends[-1]] = torch.tensor([*chain.from_iterable(documents)])
        valid[row, : ends[-1]] = True
        places.append(list(pairwise(ends)))
    return ids, valid, places


@torch.no_grad()
def alone(model: torch.nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Final hidden states [tokens, hidden] and router logits [tokens, layers, experts] of one document."""
    seen: list[Tensor] = []
    hooks = [
        layer.mlp.router.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
        for layer in model.model.layers
    ]
    hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    return hidden, torch.stack(seen, dim=1)


@pytest.mark.parametrize("experts", ["packed", "eager", "grouped_mm"])
def test_a_packed_document_gives_what_it_gives_alone(micro_model, reference, experts):
    loaded = load(micro_model, experts)
    ids, valid, places = packed(separator_id(loaded.tokenizer))
    with torch.no_grad():
        hidden, routers = loaded.hidden_states(ids, valid)
    assert hidden.isfinite().all(), "padding too"
    for row, documents in enumerate(places):
        for begin, end in documents:
            expected, expected_routers = alone(reference, ids[row, begin:end])
            torch.testing.assert_close(hidden[row, begin:end].double(), expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(routers[row, begin:end].double(), expected_routers, atol=1e-4, rtol=1e-4)


def test_a_student_stays_within_documents_too(micro_model, micro_overlay):
    student = load_student(ModelSection(path=micro_model, device="cpu", attention="document"), micro_overlay)
    ids, valid, places = packed(separator_id(student.tokenizer))
    with torch.no_grad():
        hidden, _ = student.hidden_states(ids, valid)
        for row, documents in enumerate(places):
            for begin, end in documents:
                part = ids[row : row + 1, begin:end]
                expected = student.model.base_model(input_ids=part, use_cache=False).last_hidden_state[0]
                torch.testing.assert_close(hidden[row, begin:end], expected, atol=1e-4, rtol=1e-4)


def test_by_default_a_token_attends_to_earlier_documents(micro_model, reference):
    loaded = load(micro_model, attention="sequence")
    ids, valid, places = packed(separator_id(loaded.tokenizer))
    with torch.no_grad():
        hidden, _ = loaded.hidden_states(ids, valid)
    whole, _ = alone(reference, ids[0][valid[0]])
    torch.testing.assert_close(hidden[0][valid[0]].double(), whole, atol=1e-4, rtol=1e-4)
    begin, end = places[0][1]
    expected, _ = alone(reference, ids[0, begin:end])
    assert (hidden[0, begin:end] - expected).abs().max() > 0.1, "the documents before change it"


def test_padding_does_not_matter(micro_model):
    loaded = load(micro_model)
    ids, valid, _ = packed(separator_id(loaded.tokenizer))
    other = torch.where(valid, ids, 7)
    with torch.no_grad():
        (hidden, _), (changed, _) = loaded.hidden_states(ids, valid), loaded.hidden_states(other, valid)
    assert torch.equal(hidden[valid], changed[valid])


@pytest.mark.parametrize("attention", ["document", "sequence"])
def test_gradients_cross_documents_only_in_sequences(micro_model, attention):
    loaded = load(micro_model, attention=attention)
    ids, valid, places = packed(separator_id(loaded.tokenizer))
    embedded: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    hook = loaded.model.get_input_embeddings().register_forward_hook(keep)
    hidden, _ = loaded.hidden_states(ids, valid)
    hook.remove()
    begin, end = places[1][1]
    hidden[1, end - 20 : end].square().sum().backward()
    gradient = embedded[0].grad
    assert gradient is not None
    assert gradient[1, begin].abs().max() > 0, "the whole document, further back than the window"
    assert bool(gradient[1, :begin].any()) == (attention == "sequence")
    assert not gradient[0].any()
    assert not gradient[1, end:].any()


def test_one_document_is_the_same_either_way(micro_model):
    ids = torch.tensor([random_text(LENGTH, 5)])
    valid = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        (one, _), (other, _) = (
            load(micro_model, attention=a).hidden_states(ids, valid) for a in ("document", "sequence")
        )
    assert torch.equal(one, other)


def test_each_document_is_rotated_from_position_0(micro_model):
    """Rotations are relative: the results alone would not show it."""
    loaded = load(micro_model)
    ids, valid, places = packed(separator_id(loaded.tokenizer))
    seen: list[Tensor] = []
    hook = loaded.model.model.rotary_emb.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1]))
    with torch.no_grad():
        loaded.hidden_states(ids, valid)
    hook.remove()
    for row, documents in enumerate(places):
        for begin, end in documents:
            assert seen[0][row, begin:end].tolist() == list(range(end - begin))


@pytest.mark.parametrize("seed", range(20))
def test_positions_count_from_the_separator_on(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 4, (3, 40), generator=generator)
    ends = torch.randint(1, 41, (3,), generator=generator)
    valid = torch.arange(40) < ends[:, None]
    expected = []
    for row, end in zip(ids.tolist(), ends.tolist(), strict=True):
        position, found = -1, []
        for place, token in enumerate(row):
            position = 0 if token == 0 or place >= end else position + 1
            found.append(position)
        expected.append(found)
    assert document_positions(ids, valid, separator=0).tolist() == expected
