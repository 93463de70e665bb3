"""A worker's whole step without Ray: stored and online teachers, any split of the batch, what validation records."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nexus_ray.config import LOSSES, Config, ModelSection
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import LoadedModel, load_base
from nexus_ray.targets.encoding.encodings import OutputEncoding, SampledEncoding
from nexus_ray.targets.encoding.routers import RouterEncoding
from nexus_ray.targets.encoding.top_k import TopKEncoding
from nexus_ray.targets.reading.reader import TargetBatch, TargetSet
from nexus_ray.targets.teacher import HiddenTargets, OutputTargets, RouterTargets
from nexus_ray.training import trainer
from nexus_ray.training.task import DistilTask

LENGTH, SEQUENCES = 24, 16  # of a sequence, of each source
SOURCES = {
    "play": {"sequences_per_step": 3, "cross_entropy": 1.0, "router_kl": 0.5},
    "prose": {"sequences_per_step": 4, "output_kl": 2.0, "router_kl": 0.5},
}


class Stored:
    """A target set of random sequences in memory, with what the base says about them."""

    def __init__(self, base: LoadedModel, encoding: OutputEncoding | None = None, every: int = 1) -> None:
        generator = torch.Generator().manual_seed(3)
        self.base = base
        self.encoding = encoding
        self.every = every
        self.ids = torch.randint(0, base.config["vocab_size"], (2 * SEQUENCES, LENGTH), generator=generator)
        self.lengths = torch.randint(LENGTH // 2, LENGTH + 1, (2 * SEQUENCES,), generator=generator)
        hidden = torch.rand(2 * SEQUENCES, LENGTH, generator=generator) < 0.3
        valid = torch.arange(LENGTH) < self.lengths[:, None]
        self.mask = valid & (torch.arange(LENGTH) > 0) & ~hidden
        with torch.no_grad():
            self.hidden, self.routers = base.hidden_states(self.ids, valid)

    def sequences(self, source: str) -> np.ndarray:
        return np.arange(SEQUENCES) + SEQUENCES * list(SOURCES).index(source)

    def num_tokens(self, sequences: Sequence[int]) -> np.ndarray:
        return self.lengths[torch.as_tensor(sequences)].numpy()

    def num_targets(self, sequences: Sequence[int]) -> np.ndarray:
        return self.mask[torch.as_tensor(sequences)].sum(-1).numpy()

    def num_router_positions(self, sequences: Sequence[int]) -> np.ndarray:
        return -(-self.num_tokens(sequences) // self.every)

    def read(self, sequences: Sequence[int], *, teacher: bool = True) -> TargetBatch:
        rows = torch.as_tensor(sequences)
        batch = TargetBatch(self.ids[rows], self.lengths[rows], self.mask[rows])
        if not teacher:
            return batch
        stored = batch.valid & (torch.arange(LENGTH) % self.every == 0)
        router = RouterTargets((0, 1), self.every, logits=self.routers[rows][stored])
        return replace(batch, output=self._output(rows, batch.loss_mask), router=router)

    def _output(self, rows: torch.Tensor, mask: torch.Tensor) -> OutputTargets:
        hidden = self.hidden[rows][:, :-1][mask[:, 1:]]
        if self.encoding is None:
            return HiddenTargets(hidden)
        logits = hidden @ self.base.head.T
        if isinstance(self.encoding, SampledEncoding):
            offsets = logits[:, 0].double() % 1  # of the position alone, whatever batch it is in
            return self.encoding.decode(self.encoding.encode(logits, offsets))
        return self.encoding.decode(self.encoding.encode(logits))


@pytest.fixture(scope="module")
def base(micro_model: Path) -> LoadedModel:
    return load_base(ModelSection(path=micro_model, device="cpu", dtype="float32"))


MakeTask = Callable[..., DistilTask]


@pytest.fixture
def make_task(
    make_micro_config: Callable[..., Config], micro_overlay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeTask]:
    """A function (stored, world=(rank, size), **overrides) -> DistilTask."""
    made: list[DistilTask] = []

    def make(stored: Stored, world: tuple[int, int] = (0, 1), **overrides: object) -> DistilTask:
        settings = {"train.sources": SOURCES, "train.validation_sequences": 4, "model.dtype": "float32"}
        settings |= {"resources.cpus_per_worker": 1, "train.micro_batch_sequences": 3}
        config = make_micro_config(tmp_path / "run", **(settings | overrides))
        layout = RunLayout(config.run.directory)
        shutil.copytree(micro_overlay, layout.initial_overlay, dirs_exist_ok=True)
        monkeypatch.setattr(trainer, "world", lambda: world)
        monkeypatch.setattr(trainer, "devices", lambda: [torch.device("cpu")])
        monkeypatch.setattr(trainer, "data_parallel", lambda module: module)
        monkeypatch.setattr(TargetSet, "open", classmethod(lambda cls, place, *identities: stored))
        made.append(DistilTask(config, layout))
        return made[-1]

    yield make
    for task in made:
        task.close()


def step(task: DistilTask, number: int = 0) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a step records, and its gradients."""
    for parameter in task.parameters.values():
        parameter.grad = None
    record = task.accumulate(number)
    gradients = {name: parameter.grad for name, parameter in task.parameters.items()}
    assert all(gradient is not None for gradient in gradients.values())
    return record, {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}


def numbers_in(record: Any, name: str = "") -> dict[str, float]:
    """All numbers of a record by dotted name."""
    if not isinstance(record, dict | list):
        return {name: record}
    items = record.items() if isinstance(record, dict) else enumerate(record)
    return {key: value for part, inner in items for key, value in numbers_in(inner, f"{name}.{part}").items()}


def assert_same(found: Any, expected: Any, rtol: float = 1e-4) -> None:
    numbers = numbers_in(found[0])
    assert numbers.keys() == numbers_in(expected[0]).keys()
    for name, value in numbers_in(expected[0]).items():
        rounding = 2e-6 if name.startswith(".router.") else None  # numbers about routers have six digits
        assert numbers[name] == pytest.approx(value, rel=rtol, abs=rounding), name
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=rtol, atol=rtol * float(gradient.abs().max()))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_stored_hidden_states_and_an_online_teacher_are_the_same_training(make_task, base, divergence):
    settings = {"train.output_divergence": divergence, "train.output_temperature": 2.0}
    offline = step(make_task(Stored(base), **{"targets.mode": "hidden"}, **settings))
    online = step(make_task(Stored(base), **{"train.mode": "online"}, **settings))
    assert offline[0]["output_kl"] > 0
    assert offline[0]["router_kl"] > 0
    assert_same(online, offline)


def test_every_token_kept_is_what_an_online_teacher_says(make_task, base):
    """Up to the encoding's rounding."""
    vocabulary = base.config["vocab_size"]
    everything = Stored(base, TopKEncoding(k=vocabulary - 1, vocabulary=vocabulary, value_bits=16))
    found, _ = step(make_task(everything))
    online, _ = step(make_task(Stored(base), **{"train.mode": "online"}))
    assert numbers_in(found) == pytest.approx(numbers_in(online), rel=2e-2)


@pytest.mark.parametrize("encoding", [TopKEncoding, SampledEncoding])
def test_any_size_of_micro_batch_is_the_same_step(make_task, base, encoding):
    vocabulary = base.config["vocab_size"]
    sizes = {"k": 8} if encoding is TopKEncoding else {"draws": 8}
    stored = Stored(base, encoding(vocabulary=vocabulary, **sizes), every=3)
    whole = step(make_task(stored, **{"train.micro_batch_sequences": 64}), 2)
    for size in (1, 2):
        assert_same(step(make_task(stored, **{"train.micro_batch_sequences": size}), 2), whole)


def test_workers_together_take_the_step_of_one(make_task, base):
    alone = step(make_task(Stored(base)), 1)
    parts = [step(make_task(Stored(base), world=(rank, 3)), 1) for rank in range(3)]
    # What data parallelism does: losses are added up, gradients averaged. Other numbers are of the batch, or means.
    added = {name: sum(part[0][name] for part in parts) for name in ("loss", *LOSSES) if name in alone[0]}
    record = alone[0] | added
    gradients = {name: sum(part[1][name] for part in parts) / 3 for name in alone[1]}
    assert_same((record, gradients), alone)


def test_padding_and_masked_tokens_change_nothing(make_task, base):
    """Other tokens where nothing is valid, and other targets' worth of them."""
    stored, other = Stored(base), Stored(base)
    padding = torch.arange(LENGTH) >= other.lengths[:, None]
    other.ids = torch.where(padding, (other.ids + 1) % base.config["vocab_size"], other.ids)
    assert_same(step(make_task(other)), step(make_task(stored)), rtol=1e-6)


def test_the_recorded_loss_is_the_weighted_sum_of_the_terms_and_falls_with_training(make_task, base):
    task = make_task(Stored(base), **{"train.optimiser.learning_rate": 5e-3})
    records = []
    for _ in range(6):
        records.append(step(task)[0])
        task.optimiser.step()
    first = records[0]
    terms = {"cross_entropy", "output_kl", "router_kl"}
    assert {name for name in LOSSES if name in first} == terms
    for term in terms:
        assert first[term] == pytest.approx(sum(source.get(term, 0.0) for source in first["sources"].values()))
    assert first["weights"]["prose"] == {"output_kl": 2.0, "router_kl": 0.5}
    assert first["loss"] == pytest.approx(first["cross_entropy"] + first["output_kl"] + first["router_kl"])
    assert records[-1]["loss"] < 0.9 * first["loss"]


def test_divergence_is_watched_in_terms_that_never_change_their_meaning(make_task, base):
    sources = {"play": {"sequences_per_step": 5, "cross_entropy": 1.0, "output_kl": [[0, 1], [1, 2]]}}
    task = make_task(Stored(base), **{"train.sources": sources})
    record, _ = step(task, 1)
    assert record["watched"] == record["sources"]["play"]["cross_entropy"] < record["loss"]
    sources["play"]["cross_entropy"] = [[0, 1], [1, 2]]
    task = make_task(Stored(base), **{"train.sources": sources})
    assert step(task, 1)[0]["watched"] is None


def test_validation_records_the_objective_and_each_sources_next_token_loss(make_task, base):
    """Against transformers' own loss, sequence by sequence; a source without cross-entropy is measured too."""
    stored = Stored(base)
    task = make_task(stored)
    record = task.validate()
    for name in SOURCES:
        total, tokens = 0.0, 0
        for sequence in task.feed.validation()[name].tolist():
            batch = stored.read([sequence], teacher=False)
            labels = batch.input_ids.masked_fill(~batch.loss_mask, -100)
            with torch.no_grad():
                model = task.student.model
                mean = model(input_ids=batch.input_ids, attention_mask=batch.valid.long(), labels=labels).loss
            total += float(mean) * int(batch.loss_mask.sum())
            tokens += int(batch.loss_mask.sum())
        assert record["losses"][name] == pytest.approx(total / tokens, rel=1e-4)
    assert record["cross_entropy"] == pytest.approx(record["losses"]["play"], rel=1e-6)
    assert all(parameter.grad is None for parameter in task.parameters.values())


def test_a_batch_of_the_router_term_alone_gives_every_parameter_a_gradient(make_task, base):
    routed = {name: {"sequences_per_step": 2, "router_kl": 1.0} for name in SOURCES}
    record, gradients = step(make_task(Stored(base), **{"train.sources": routed}))
    assert record["router_kl"] > 0
    last = [gradient for name, gradient in gradients.items() if name.startswith("shared_experts.1.") or ".1." in name]
    assert last
    assert not any(gradient.any() for gradient in last)


def test_selected_experts_are_a_lower_bound_of_all_logits(make_task, base):
    stored = Stored(base)
    encoding = RouterEncoding(mode="selected", layers=(0, 1), every=1, experts=8, experts_per_token=2, temperature=1.0)
    plain = stored.read

    def read(sequences: Sequence[int], *, teacher: bool = True) -> TargetBatch:
        batch = plain(sequences, teacher=teacher)
        if batch.router is None:
            return batch
        return replace(batch, router=encoding.decode(encoding.encode(batch.router.logits)))

    every, _ = step(make_task(stored))
    stored.read = read
    selected, _ = step(make_task(stored))
    assert 0 < selected["router_kl"] < every["router_kl"]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_alone_trains_routers_that_are_trained(make_task, base, loss):
    """In every layer: what is said about one layer's routers reaches the earlier ones through what they pass on."""
    sources = {name: {"sequences_per_step": 1, loss: 1.0} for name in SOURCES}
    settings = {"train.mode": "online", "train.routers.train": "all", "train.sources": sources}
    record, gradients = step(make_task(Stored(base), **settings))
    assert record["loss"] == pytest.approx(record[loss])
    routers = {name: gradient for name, gradient in gradients.items() if "router" in name}
    assert routers
    assert all(gradient.any() for name, gradient in routers.items()), routers.keys()


def test_all_losses_together_are_the_same_step_in_micro_batches_of_any_size(make_task, base):
    weights = dict.fromkeys(LOSSES, 0.5)
    sources = {"play": {"sequences_per_step": 3, **weights}, "prose": {"sequences_per_step": 4, **weights}}
    settings = {"train.mode": "online", "train.routers.train": "all", "train.sources": sources}
    whole = step(make_task(Stored(base), **settings, **{"train.micro_batch_sequences": 64}))
    assert all(whole[0][loss] > 0 for loss in LOSSES)
    assert_same(step(make_task(Stored(base), **settings, **{"train.micro_batch_sequences": 2})), whole)


@pytest.mark.parametrize("routers", ["none", "all"])
def test_training_changes_no_bit_of_the_base(make_task, base, routers):
    task = make_task(Stored(base), **{"train.mode": "online", "train.routers.train": routers})
    model = task.student.model
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    trained = {name: parameter.detach().clone() for name, parameter in task.parameters.items()}
    ids = torch.arange(24).view(1, -1)
    with torch.no_grad(), task.student.base():
        says = task.student.forward(ids, torch.ones_like(ids, dtype=torch.bool))
    for number in range(3):
        step(task, number)
        task.optimiser.step()
    assert all(not torch.equal(task.parameters[name], tensor) for name, tensor in trained.items())
    now = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    with torch.no_grad(), task.student.base():
        after = task.student.forward(ids, torch.ones_like(ids, dtype=torch.bool))
    assert all(torch.equal(*pair) for pair in zip(says, after, strict=True))
