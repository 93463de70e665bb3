"""Loss buffers against what the project's own losses keep and allocate, and the order of micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nexus_ray.config import Config
from nexus_ray.modeling import head
from nexus_ray.planning.losses import LossBuffers, loss_buffers, micro_batches
from nexus_ray.planning.sizes import ModelSizes, read_sizes
from nexus_ray.planning.target_sizes import source_targets
from nexus_ray.targets.reading.reader import TargetBatch
from nexus_ray.targets.teacher import HiddenTargets, OutputTargets, RouterTargets, SampledTargets, TopKTargets
from nexus_ray.training.losses.objective import MicroBatch, Output, loss_of, objective_at, shares, term_counts

_SEQUENCES, _LENGTH, _VOCABULARY, _HIDDEN = 2, 64, 20_000, 96
_POSITIONS = _SEQUENCES * (_LENGTH - 1)
_TERMS = {"cross_entropy": 1.0}, {"output_kl": 2.0}, {"cross_entropy": 1.0, "output_kl": 2.0}
MakeConfig = Callable[..., Config]
SavedBytes = Callable[..., int]
MostAllocated = Callable[[Callable[[], object]], int]


@pytest.fixture
def sizes(micro_model: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSizes:
    """A model with a large vocabulary, whose logits are formed a few positions at a time."""
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 40 * _VOCABULARY * 4})
    micro = read_sizes(micro_model)
    dimensions = dataclasses.replace(micro.dimensions, hidden_size=_HIDDEN, layers=6, experts=128)
    return dataclasses.replace(micro, vocabulary=_VOCABULARY, dimensions=dimensions)


def _config(make: MakeConfig, run: Path, mode: str, terms: dict[str, float], **settings: object) -> Config:
    sources = {"play": {"sequences_per_step": 4, "cross_entropy": 1.0}, "prose": {"sequences_per_step": 2, **terms}}
    how = {"train.mode": "online"} if mode == "online" else {"targets.mode": mode}
    return make(run, **{**how, "train.sources": sources, "data.sequence_length": _LENGTH, **settings})


def _teacher(mode: str, dtype: torch.dtype) -> OutputTargets:
    ids = torch.arange(16).expand(_POSITIONS, 16)
    if mode == "topk":
        log_probs = torch.randn(_POSITIONS, 17).log_softmax(-1)
        return TopKTargets(ids, log_probs[:, :16].contiguous(), log_probs[:, 16].contiguous())
    if mode == "sampled":
        return SampledTargets(ids, torch.ones(_POSITIONS))
    return HiddenTargets(torch.randn(_POSITIONS, _HIDDEN).to(dtype))


def _loss(config: Config, sizes: ModelSizes, dtype: torch.dtype, teacher: dict[str, object]) -> Callable[[], Tensor]:
    ids = torch.randint(0, _VOCABULARY, (_SEQUENCES, _LENGTH))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    tokens = torch.full((_SEQUENCES,), _LENGTH)
    part = MicroBatch("prose", TargetBatch(ids, tokens, mask, **teacher))  # type: ignore[arg-type]
    dimensions = sizes.dimensions
    routers = torch.randn(_SEQUENCES, _LENGTH, dimensions.layers, dimensions.experts).to(dtype).requires_grad_(True)
    output = Output(
        torch.randn(_SEQUENCES, _LENGTH, _HIDDEN).to(dtype).requires_grad_(True),
        routers,
        torch.randn(_VOCABULARY, _HIDDEN).to(dtype),
        dimensions.experts_per_token,
    )
    objective = objective_at(config.train, 1.0)
    of_prose = {"prose": objective.weights["prose"]}
    counts = term_counts(of_prose, {"prose": _POSITIONS}, {"prose": 128}, {"prose": _SEQUENCES * _LENGTH})
    weights = shares(of_prose["prose"], counts)
    return lambda: loss_of(part, output, objective, weights)[0]


def _planned(config: Config, sizes: ModelSizes, dtype: torch.dtype) -> LossBuffers:
    return loss_buffers({"prose": _SEQUENCES}, config, sizes, source_targets(config, sizes, {}), dtype.itemsize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["topk", "sampled", "hidden", "online"])
@pytest.mark.parametrize("terms", _TERMS, ids=lambda terms: "+".join(terms))
def test_next_token_losses_take_what_is_planned(
    micro_config: MakeConfig,
    sizes: ModelSizes,
    saved_bytes: SavedBytes,
    most_allocated: MostAllocated,
    tmp_path: Path,
    mode: str,
    terms: dict[str, float],
    dtype: torch.dtype,
) -> None:
    config = _config(micro_config, tmp_path, mode, terms)
    planned = _planned(config, sizes, dtype)
    loss = _loss(config, sizes, dtype, {"output": _teacher(mode, dtype)})
    hidden = _SEQUENCES * _LENGTH * _HIDDEN * dtype.itemsize
    taught = _POSITIONS * _HIDDEN * dtype.itemsize if mode == "online" and "output_kl" in terms else 0
    saved = planned.kept - hidden - taught
    assert saved == pytest.approx(saved_bytes(loss), rel=0.05)
    assert saved + planned.chunk + planned.working == pytest.approx(most_allocated(loss), rel=0.05)
    assert most_allocated(loss().backward) < 4 * hidden  # nothing over the vocabulary


@pytest.mark.parametrize("form", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("mode", ["topk", "hidden"])
def test_every_divergence_takes_what_is_planned(
    micro_config: MakeConfig, sizes: ModelSizes, most_allocated: MostAllocated, tmp_path: Path, mode: str, form: str
) -> None:
    settings = {"train.output_divergence": form, "train.output_temperature": 2.0}
    config = _config(micro_config, tmp_path, mode, {"output_kl": 1.0}, **settings)
    planned = _planned(config, sizes, torch.float32)
    loss = _loss(config, sizes, torch.float32, {"output": _teacher(mode, torch.float32)})
    assert planned.chunk == pytest.approx(most_allocated(loss), rel=0.07)


@pytest.mark.parametrize(("mode", "layers", "every"), [("online", 6, 1), ("topk", 6, 1), ("topk", 5, 4)])
def test_router_losses_take_what_is_planned(
    micro_config: MakeConfig,
    sizes: ModelSizes,
    saved_bytes: SavedBytes,
    most_allocated: MostAllocated,
    tmp_path: Path,
    mode: str,
    layers: int,
    every: int,
) -> None:
    settings = {"targets.router_layers": list(range(layers)), "targets.router_every": every}
    config = _config(micro_config, tmp_path, mode, {"router_kl": 1.0}, **settings)
    planned = _planned(config, sizes, torch.float32)
    positions = _SEQUENCES * _LENGTH // every
    routers = RouterTargets(tuple(range(layers)), every, logits=torch.randn(positions, layers, 128))
    loss = _loss(config, sizes, torch.float32, {"router": routers})
    of_teacher = routers.logits.nbytes if mode == "online" else 0
    saved = planned.kept - _SEQUENCES * _LENGTH * _HIDDEN * 4 - of_teacher
    assert saved == pytest.approx(saved_bytes(loss), rel=0.05)
    assert saved + planned.working == pytest.approx(most_allocated(loss), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["hidden", "online"])
@pytest.mark.parametrize("also", [{}, {"cross_entropy": 1.0}, {"output_kl": 1.0}], ids=lambda terms: "+".join(terms))
def test_matching_hidden_states_takes_what_is_planned(
    micro_config: MakeConfig,
    sizes: ModelSizes,
    saved_bytes: SavedBytes,
    most_allocated: MostAllocated,
    tmp_path: Path,
    mode: str,
    also: dict[str, float],
    dtype: torch.dtype,
) -> None:
    config = _config(micro_config, tmp_path, mode, {"hidden_mse": 1.0} | also)
    planned = _planned(config, sizes, dtype)
    loss = _loss(config, sizes, dtype, {"output": _teacher("hidden", dtype)})
    state = _HIDDEN * dtype.itemsize
    taught = _POSITIONS * state if mode == "online" else 0
    saved = planned.kept - _SEQUENCES * _LENGTH * state - taught
    assert saved == pytest.approx(saved_bytes(loss), rel=0.05)
    assert saved + planned.chunk + planned.working == pytest.approx(most_allocated(loss), rel=0.05)
    assert bool(planned.chunk) == bool(also), "matching hidden states forms no logits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "terms",
    [("load_balancing",), ("router_z",), ("load_balancing", "router_z"), ("router_kl", "load_balancing", "router_z")],
)
def test_losses_of_trained_routers_take_what_is_planned(
    micro_config: MakeConfig,
    sizes: ModelSizes,
    saved_bytes: SavedBytes,
    most_allocated: MostAllocated,
    tmp_path: Path,
    terms: tuple[str, ...],
    dtype: torch.dtype,
) -> None:
    """At most half a buffer and a tenth too much is planned: types, and how far each term is when the next begins."""
    config = _config(micro_config, tmp_path, "topk", dict.fromkeys(terms, 1.0), **{"train.routers.train": "all"})
    planned = _planned(config, sizes, dtype)
    routers = RouterTargets(tuple(range(6)), 1, logits=torch.randn(_SEQUENCES * _LENGTH, 6, 128))
    loss = _loss(config, sizes, dtype, {"router": routers})
    saved = planned.kept - _SEQUENCES * _LENGTH * _HIDDEN * dtype.itemsize
    assert saved == pytest.approx(saved_bytes(loss), rel=0.1)
    most, buffer = most_allocated(loss), routers.logits.nbytes
    assert 0.95 * most <= saved + planned.working <= 1.1 * most + buffer / 2


@torch.no_grad()
@pytest.mark.parametrize("terms", [("hidden_mse",), ("load_balancing", "router_z"), ("router_kl", "router_z")])
def test_validation_takes_what_is_planned_of_the_terms_without_the_head(
    micro_config: MakeConfig, sizes: ModelSizes, most_allocated: MostAllocated, tmp_path: Path, terms: tuple[str, ...]
) -> None:
    settings = {"train.routers.train": "all", "targets.mode": "hidden"}
    config = _config(micro_config, tmp_path, "hidden", dict.fromkeys(terms, 1.0), **settings)
    targets = source_targets(config, sizes, {})
    planned = loss_buffers({"prose": _SEQUENCES}, config, sizes, targets, 4, validating=True)
    routers = RouterTargets(tuple(range(6)), 1, logits=torch.randn(_SEQUENCES * _LENGTH, 6, 128))
    loss = _loss(config, sizes, torch.float32, {"output": _teacher("hidden", torch.float32), "router": routers})
    assert planned.working == pytest.approx(most_allocated(loss), rel=0.05)
    assert planned.kept == _SEQUENCES * _LENGTH * _HIDDEN * 4


def test_validation_forms_the_cross_entropy_of_every_source_and_keeps_no_gradient(
    micro_config: MakeConfig, sizes: ModelSizes, tmp_path: Path
) -> None:
    config = _config(micro_config, tmp_path, "topk", {"output_kl": 1.0})
    targets = source_targets(config, sizes, {})
    training, validating = (
        loss_buffers({"prose": 2}, config, sizes, targets, 4, validating=validating) for validating in (False, True)
    )
    unit = 40 * _VOCABULARY * 4
    assert (training.chunk, validating.chunk) == (2 * unit, 3 * unit)
    assert validating.kept == _SEQUENCES * _LENGTH * _HIDDEN * 4 < training.kept


def test_the_vocabulary_does_not_meet_the_batch(micro_config: MakeConfig, sizes: ModelSizes, tmp_path: Path) -> None:
    config = _config(micro_config, tmp_path, "topk", {"output_kl": 1.0})
    targets = source_targets(config, sizes, {})
    few, many = (loss_buffers({"prose": count}, config, sizes, targets, 4) for count in (2, 200))
    assert few.chunk == many.chunk
    assert many.kept == 100 * few.kept


@pytest.mark.parametrize(("workers", "size"), [(1, 3), (2, 3), (3, 2), (2, 64)])
def test_every_sequence_of_a_step_is_in_one_micro_batch_of_bounded_size(
    micro_config: MakeConfig, tmp_path: Path, workers: int, size: int
) -> None:
    config = micro_config(tmp_path, **{"resources.workers": workers, "train.micro_batch_sequences": size})
    counts = [sum(batch.values()) for batch in micro_batches(config)]
    assert sum(counts) == -(-8 // workers)  # of 4 + 4, what the first worker takes
    assert all(count == size for count in counts[:-1])
    assert counts[-1] <= size
