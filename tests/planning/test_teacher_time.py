"""Floating-point operations against PyTorch's own count of the loaded model, and time against a pass's clock."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nexus_ray.config import Config, ModelSection
from nexus_ray.modeling.loading import LoadedModel, load_base
from nexus_ray.planning import probe, teacher_time
from nexus_ray.planning.base_passes import PassTime, pass_times
from nexus_ray.planning.cost_table import duration_text
from nexus_ray.planning.probe import LayerSpeed
from nexus_ray.planning.sizes import ModelSizes, read_sizes
from nexus_ray.planning.target_sizes import source_targets
from nexus_ray.planning.teacher_time import flop_per_token
from nexus_ray.planning.text import SourceText

_TEXT = {"play": SourceText(1, 10, 100_000), "prose": SourceText(1, 10, 50_000)}
_ROUTERS = {"train.sources.prose": {"sequences_per_step": 4, "router_kl": 1.0}}
MakeConfig = Callable[..., Config]
Times = Callable[[Config], dict[str, PassTime]]


@pytest.fixture
def sizes(micro_model: Path) -> ModelSizes:
    return read_sizes(micro_model)


@pytest.fixture(scope="module")
def base(micro_model: Path) -> LoadedModel:
    return load_base(ModelSection(path=micro_model, device="cpu"))


@pytest.fixture
def times(sizes: ModelSizes) -> Times:
    """A function config -> the base's passes by stage."""
    return lambda config: {each.stage: each for each in pass_times(config, sizes, source_targets(config, sizes, _TEXT))}


@pytest.mark.parametrize("length", [16, 96])
@pytest.mark.parametrize("head", [False, True])
def test_operations_are_those_that_torch_counts(base: LoadedModel, sizes: ModelSizes, length: int, head: bool) -> None:
    ids = torch.randint(0, 4000, (2, length))
    valid = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        (base.forward if head else base.hidden_states)(ids, valid)
    assert flop_per_token(sizes, length, head=head) == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.01)


def test_the_expected_time_is_near_that_of_the_model(
    base: LoadedModel, micro_config: MakeConfig, times: Times, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a factor of three, by the thread's own clock: what else the machine does disturbs either."""
    monkeypatch.setattr(probe.time, "perf_counter", time.thread_time)
    settings = {"data.sequence_length": 256, "collect.batch_sequences": 16, "resources.workers": 1}
    planned = times(micro_config(tmp_path, **settings))["collect"]
    ids = torch.randint(0, 4000, (16, 256))
    valid = torch.ones_like(ids, dtype=torch.bool)
    taken = []
    for _ in range(4):
        started = time.thread_time()
        with torch.no_grad():
            base.hidden_states(ids, valid)
        taken.append(time.thread_time() - started)
    assert planned.measured
    assert 1 / 3 < planned.seconds / planned.tokens / (min(taken) / ids.numel()) < 3


def test_the_probe_leaves_the_threads_as_they_were(micro_config: MakeConfig, times: Times, tmp_path: Path) -> None:
    times(micro_config(tmp_path, **{"resources.cpus_per_worker": 2, "data.sequence_length": 32}))
    assert torch.get_num_threads() == 1


@pytest.fixture
def fixed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a layer take a millisecond, so times can be compared."""
    monkeypatch.setattr(teacher_time, "time_layer", lambda *_: LayerSpeed(1e-3, 1e-3, 1e-3, 1e-9))
    monkeypatch.setattr(teacher_time, "encoding_seconds", lambda *_: 1e-3)


@pytest.mark.usefixtures("fixed_speed")
def test_parts_of_a_layer_add_up_to_a_pass(
    micro_config: MakeConfig, sizes: ModelSizes, times: Times, tmp_path: Path
) -> None:
    """A batch of 4 sequences of 64 tokens meets all 8 experts, 2 heads a sequence, in both layers; and a tenth more."""
    found = times(micro_config(tmp_path, **{"resources.workers": 2}))
    batch = 1.1 * 2 * (8 + 4 * 2 + 4 * 64) * 1e-3
    assert found["collect"].seconds == pytest.approx(4096 / 256 * batch / 2)
    with_head = batch / 256 + 2 * 64 * sizes.vocabulary * 1e-9 + 1e-3
    assert found["precompute"].seconds == pytest.approx(50_000 * with_head / 2)


@pytest.mark.usefixtures("fixed_speed")
@pytest.mark.parametrize("settings", [{"targets.mode": "hidden"}, _ROUTERS], ids=["hidden states", "routers only"])
def test_targets_that_need_no_logits_cost_what_a_pass_without_a_head_does(
    micro_config: MakeConfig,
    times: Times,
    tmp_path: Path,
    settings: dict[str, object],
) -> None:
    found = times(micro_config(tmp_path, **settings))
    collect, precompute = found["collect"], found["precompute"]
    assert precompute.tokens == 50_000
    assert precompute.flop / precompute.tokens == pytest.approx(collect.flop / collect.tokens)
    assert precompute.seconds / precompute.tokens == pytest.approx(collect.seconds / collect.tokens)


def test_text_without_a_teacher_takes_no_pass(micro_config: MakeConfig, times: Times, tmp_path: Path) -> None:
    assert list(times(micro_config(tmp_path, **{"train.mode": "online"}))) == ["collect"]


@pytest.mark.usefixtures("fixed_speed")
def test_wanted_tokens_bound_the_teacher(micro_config: MakeConfig, times: Times, tmp_path: Path) -> None:
    found = times(micro_config(tmp_path, **{"targets.max_tokens": 12_000}))
    assert found["precompute"].tokens == 15_000  # three of ten shards


def test_a_gpu_that_cannot_be_measured_has_an_assumed_speed(
    micro_config: MakeConfig, times: Times, tmp_path: Path
) -> None:
    def found(workers: int, gpus: float) -> PassTime:
        settings = {"resources.workers": workers, "resources.gpus_per_worker": gpus}
        return times(micro_config(tmp_path, **settings))["collect"]

    assert not found(3, 2).measured
    # The layers of one pass are on both GPUs of a worker, which compute one after the other.
    assert found(3, 2).seconds == pytest.approx(found(1, 1).seconds / 3)


def test_operations_of_the_published_shape(sizes: ModelSizes) -> None:
    """GPT-OSS 20B: 3.61 billion active parameters, the LM head among them but not the embedding (its model card)."""
    dimensions = dataclasses.replace(
        sizes.dimensions, layers=24, experts=32, experts_per_token=4, hidden_size=2880, intermediate_size=2880
    )
    shape = {"attention_heads": 64, "key_value_heads": 8, "head_dim": 64, "vocabulary": 201_088}
    large = dataclasses.replace(sizes, dimensions=dimensions, **shape)
    scores = 24 * 4 * 64 * 64 * 1024
    active = (flop_per_token(large, 1024, head=True) - scores) / 2
    assert active == pytest.approx(3.61e9, rel=0.002)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.04 s"), (12.3, "12 s"), (90, "1.5 min"), (9000, "2.5 h"), (10 * 86_400, "10.0 d")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
