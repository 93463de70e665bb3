"""What a target set says is what the model says: every mode against transformers' own forward pass in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from precompute_here import decoded, manifest_of, precompute_here, rows_of, run_workers_here
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config

EVERY, LAYERS = 3, [1]


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
    return model.double().eval()


@pytest.fixture(autouse=True)
def _workers_here(monkeypatch: pytest.MonkeyPatch) -> None:
    run_workers_here(monkeypatch)


@pytest.fixture
def make_set(micro_config, micro_texts: Path, tmp_path: Path):
    """A function (settings) -> directory of a small target set: prose with output targets, play with router targets."""

    def make(**settings: object) -> Path:
        for name in ("play", "prose"):
            lines = (micro_texts / f"{name}.train.jsonl").read_text().splitlines()[:2]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        text = {f"data.sources.{name}.train": str(tmp_path / f"{name}.jsonl") for name in ("play", "prose")}
        routers = {"train.sources.play.router_kl": 1.0, "targets.router_every": EVERY, "targets.router_layers": LAYERS}
        precompute_here(micro_config(tmp_path / "run", **text, **routers, **settings), tmp_path / "targets")
        return tmp_path / "targets"

    return make


@torch.no_grad()
def answers(model: torch.nn.Module, row: dict) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(log-probabilities [targets, V], final hidden states [targets, H], router logits [tokens, E] by layer)."""
    seen: list[Tensor] = []
    hooks = [
        layer.mlp.router.register_forward_hook(lambda _m, _i, output: seen.append(output[0]))
        for layer in model.model.layers
    ]
    ids = torch.tensor([row["input_ids"]])
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    return model.lm_head(hidden).log_softmax(-1)[:-1], hidden[:-1], seen


def each(directory: Path, source: str, reference: torch.nn.Module) -> Iterator[tuple[dict, tuple]]:
    rows = rows_of(directory, source)
    assert {row["num_tokens"] for row in rows[:-1]} == {64}
    assert rows[-1]["num_tokens"] < 64, "a short sequence is among them"
    for row in rows:
        yield row, answers(reference, row)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_topk_targets_are_the_most_likely_tokens_with_their_probabilities(make_set, reference, temperature) -> None:
    directory = make_set(**{"targets.value_bits": 10, "train.output_temperature": temperature})
    encoding = manifest_of(directory).output
    for row, (log_probs, _, _) in each(directory, "prose", reference):
        found = decoded(row, encoding)
        expected = (log_probs / temperature).log_softmax(-1)
        top = expected.topk(16)
        chosen = torch.zeros_like(expected).scatter_(1, found.ids, 1.0)
        # Where the 16th and 17th token are as likely as each other to float32, either may be kept.
        least = expected.gather(1, found.ids).amin(-1)
        assert (least >= top.values[:, -1] - 1e-4).all()
        assert chosen.sum(-1).eq(16).all()
        kept = expected.gather(1, found.ids)
        assert (found.log_probs.exp() - kept.exp()).abs().max() < 2e-3
        tail = 1 - kept.exp().sum(-1)
        assert (found.tail_log_prob.exp() - tail).abs().max() < 5e-3


def test_hidden_targets_are_the_states_that_the_head_makes_logits_from(make_set, reference) -> None:
    directory = make_set(**{"targets.mode": "hidden"})
    for row, (_, hidden, _) in each(directory, "prose", reference):
        found = decoded(row, manifest_of(directory).output).hidden
        assert found.dtype == torch.bfloat16
        scale = hidden.abs().amax(-1, keepdim=True)
        assert ((found - hidden) / scale).abs().max() < 2**-8


def test_draws_occur_as_often_as_they_are_likely(make_set, reference) -> None:
    """Systematic draws: a token of probability p is drawn floor(N p) or ceil(N p) times."""
    draws = 200
    directory = make_set(**{"targets.mode": "sampled", "targets.draws": draws})
    entropies = []
    for row, (log_probs, _, _) in each(directory, "prose", reference):
        found = decoded(row, manifest_of(directory).output)
        counts = torch.zeros(log_probs.shape).scatter_add_(1, found.ids, torch.ones(found.ids.shape))
        assert (counts - draws * log_probs.exp()).abs().max() < 1 + 1e-3
        entropies.append((found.entropy - torch.special.entr(log_probs.exp()).sum(-1)).abs().max())
    assert max(entropies) < 1e-3


def test_draws_of_another_seed_are_others_and_all_shards_have_offsets_of_their_own(make_set) -> None:
    first = rows_of(make_set(**{"targets.mode": "sampled"}), "prose")
    again = rows_of(make_set(**{"targets.mode": "sampled"}), "prose")
    other = rows_of(make_set(**{"targets.mode": "sampled", "run.seed": 1}), "prose")
    assert [row["draws"] for row in first] == [row["draws"] for row in again]
    assert all(one["draws"] != two["draws"] for one, two in zip(first, other, strict=True))


def test_router_logits_are_those_of_the_chosen_layers_and_positions(make_set, reference) -> None:
    directory = make_set()
    encoding = manifest_of(directory).router
    assert encoding.layers == tuple(LAYERS)
    for row, (_, _, routers) in each(directory, "play", reference):
        found = decoded(row, encoding).logits
        expected = torch.stack([routers[layer][::EVERY] for layer in LAYERS], dim=1)
        assert found.shape == expected.shape
        difference = (found - expected) - (found - expected).mean(-1, keepdim=True)
        step = (expected.amax(-1, keepdim=True) - expected.amin(-1, keepdim=True)) / 255
        assert (difference.abs() <= step + 1e-4).all()


def test_selected_experts_are_the_most_likely_with_their_probabilities(make_set, reference) -> None:
    directory = make_set(**{"targets.router": "selected", "train.router_temperature": 2.0})
    for row, (_, _, routers) in each(directory, "play", reference):
        found = decoded(row, manifest_of(directory).router).selected
        expected = torch.stack([routers[layer][::EVERY] for layer in LAYERS], dim=1).div(2.0).log_softmax(-1)
        top = expected.topk(2)
        torch.testing.assert_close(found.ids, top.indices.sort(-1).values)
        probabilities = expected.gather(-1, found.ids).exp()
        assert (found.log_probs.exp() - probabilities).abs().max() < 5e-3
        assert (found.tail_log_prob.exp() - (1 - probabilities.sum(-1))).abs().max() < 5e-3


def test_a_source_gets_only_the_targets_that_its_losses_need(make_set) -> None:
    directory = make_set()
    assert {file.source: (file.output, file.router) for file in manifest_of(directory).files} == {
        "play": (False, True),
        "prose": (True, False),
    }
    assert not any(name.startswith("top_") for name in rows_of(directory, "play")[0])
    assert not any(name.startswith("router_") for name in rows_of(directory, "prose")[0])


def test_rows_hold_the_text_once_with_every_token_but_the_first_predicted(make_set, micro_model, tmp_path) -> None:
    directory = make_set(**{"train.mode": "online"})
    tokenizer = AutoTokenizer.from_pretrained(micro_model)
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    texts = [json.loads(line)["text"] for line in (tmp_path / "prose.jsonl").read_text().splitlines()]
    expected = [separator]
    for text in texts:
        expected += [*tokenizer.encode(text, add_special_tokens=False), separator]
    rows = rows_of(directory, "prose")
    for number, row in enumerate(rows):
        assert row["num_tokens"] == len(row["input_ids"]) == len(row["loss_mask"])
        assert row["loss_mask"] == [False] + [True] * (row["num_tokens"] - 1)
        assert row["num_targets"] == row["num_tokens"] - 1
        source, key, index = row["sequence_id"].split("/")
        assert (source, len(key), int(index)) == ("prose", 16, number)
    joined = [expected[0]] + [token for row in rows for token in row["input_ids"][1:]]
    np.testing.assert_array_equal(joined, expected)
    assert set(rows[0]) == {"sequence_id", "num_tokens", "num_targets", "input_ids", "loss_mask"}
    assert manifest_of(directory).output is None
    assert manifest_of(directory).compute is None
