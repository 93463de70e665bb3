"""Sizes of teacher targets against what the encodings write and what decoding them gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_ray.config import Config
from nexus_ray.data.packing import Batch
from nexus_ray.errors import ConfigError
from nexus_ray.evaluation.perplexity import sequence_nats
from nexus_ray.evaluation.scored_pass import position_nats
from nexus_ray.modeling import head
from nexus_ray.planning.precomputing import precompute_phases
from nexus_ray.planning.sizes import ModelSizes, read_sizes
from nexus_ray.planning.stages import stage_needs
from nexus_ray.planning.storage import storage_parts
from nexus_ray.planning.target_sizes import SourceTargets, source_targets
from nexus_ray.planning.text import SourceText
from nexus_ray.planning.weights import overlay_size
from nexus_ray.planning.worker import Worker
from nexus_ray.targets.encoding.encodings import SampledEncoding
from nexus_ray.targets.encoding.top_k import TopKEncoding
from nexus_ray.targets.reading.reader import TargetBatch
from nexus_ray.targets.writing.job import job_of_run
from nexus_ray.targets.writing.teaching import EncodingTeacher

_LENGTH = 64  # of the micro configuration
_WIDE = 20_000  # a vocabulary beside which K is small
_TEXT = {"play": SourceText(1, 10, 100_000), "prose": SourceText(1, 10, 100_000)}
_FORMS: tuple[dict[str, object], ...] = (
    {"targets.mode": "topk", "targets.top_k": 24, "targets.value_bits": 5, "targets.router": "logits"},
    {"targets.mode": "sampled", "targets.draws": 9, "targets.router": "selected"},
    {"targets.mode": "hidden", "targets.router": "logits", "targets.router_every": 3},
    {"targets.mode": "hidden", "targets.hidden_dtype": "float8", "targets.router_layers": [1]},
)
MakeConfig = Callable[..., Config]


@pytest.fixture
def sizes(micro_model: Path) -> ModelSizes:
    return read_sizes(micro_model)


def _config(make: MakeConfig, run: Path, settings: dict[str, object]) -> Config:
    """`prose` learns from outputs and routers, `play` from its text alone."""
    terms = {"sequences_per_step": 4, "output_kl": 1.0, "router_kl": 1.0}
    return make(run, **settings, **{"train.sources.prose": terms})


def _columns(source: SourceTargets, sizes: ModelSizes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One full sequence, encoded: (output columns, router columns)."""
    assert source.output is not None
    assert source.router is not None
    generator = torch.Generator().manual_seed(0)
    positions, dimensions = source.length - 1, sizes.dimensions
    logits = torch.randn(positions, sizes.vocabulary, generator=generator)
    if isinstance(source.output, TopKEncoding):
        output = source.output.encode(logits)
    elif isinstance(source.output, SampledEncoding):
        output = source.output.encode(logits, torch.rand(positions, generator=generator, dtype=torch.float64))
    else:
        output = source.output.encode(torch.randn(positions, dimensions.hidden_size, generator=generator))
    stored = len(range(0, source.length, source.router.every))
    routers = torch.randn(stored, len(source.router.layers), dimensions.experts, generator=generator)
    return output, source.router.encode(routers)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


@pytest.mark.parametrize("settings", _FORMS, ids=lambda settings: str(settings["targets.mode"]))
def test_stored_bytes_are_those_of_encoded_columns(
    micro_config: MakeConfig, sizes: ModelSizes, tmp_path: Path, settings: dict[str, object]
) -> None:
    targets = source_targets(_config(micro_config, tmp_path, settings), sizes, _TEXT)
    columns = _columns(targets["prose"], sizes)
    written = sum(column.nbytes for part in columns for column in part.values())
    assert targets["prose"].sequence_bytes == 4 * _LENGTH + written
    assert targets["prose"].stored_bytes == pytest.approx(100_000 * (4 + written / _LENGTH), abs=1)
    assert targets["play"].bytes_per_token == 4


@pytest.mark.parametrize("settings", _FORMS, ids=lambda settings: str(settings["targets.mode"]))
def test_decoded_bytes_are_those_of_a_batch(
    micro_config: MakeConfig, sizes: ModelSizes, tmp_path: Path, settings: dict[str, object]
) -> None:
    source = source_targets(_config(micro_config, tmp_path, settings), sizes, _TEXT)["prose"]
    output, router = _columns(source, sizes)
    assert source.output is not None
    assert source.router is not None
    ids = torch.zeros(1, _LENGTH, dtype=torch.int64)
    decoded = (source.output.decode(output), source.router.decode(router))
    batch = TargetBatch(ids, torch.tensor([_LENGTH]), ids.bool(), *decoded)
    held = sum(tensor.nbytes for tensor in (*_tensors(batch), batch.valid))
    assert source.decoded_bytes == pytest.approx(held, rel=0.002)


@pytest.mark.parametrize("settings", _FORMS, ids=lambda settings: str(settings["targets.mode"]))
def test_the_plan_and_the_precomputed_header_have_the_same_encodings(
    micro_config: MakeConfig, sizes: ModelSizes, tmp_path: Path, settings: dict[str, object]
) -> None:
    config = _config(micro_config, tmp_path, settings)
    header, source = job_of_run(config).header, source_targets(config, sizes, _TEXT)["prose"]
    assert (source.output, source.router) == (header.output, header.router)


def test_a_source_needs_a_teacher_and_its_head_only_where_its_losses_do(
    micro_config: MakeConfig, sizes: ModelSizes, tmp_path: Path
) -> None:
    def facts(**settings: object) -> tuple[bool, int]:
        source = source_targets(micro_config(tmp_path, **settings), sizes, _TEXT)["prose"]
        return source.needs_head, source.teacher_tokens

    routers = {"train.sources.prose": {"sequences_per_step": 4, "router_kl": 1.0}}
    text = {"train.sources.prose": {"sequences_per_step": 4, "cross_entropy": 1.0}}
    assert facts() == (True, 100_000)
    assert facts(**{"targets.mode": "hidden"}) == (False, 100_000)
    assert facts(**routers) == (False, 100_000)
    assert facts(**text) == (False, 0)
    assert facts(**{"train.mode": "online"}) == (False, 0)


@pytest.mark.parametrize(
    ("wanted", "tokens"), [(None, 100_000), (1, 10_000), (25_000, 30_000), (30_000, 30_000), (10**9, 100_000)]
)
def test_wanted_tokens_are_taken_in_whole_shards(
    micro_config: MakeConfig, sizes: ModelSizes, tmp_path: Path, wanted: int | None, tokens: int
) -> None:
    config = micro_config(tmp_path, **{"targets.max_tokens": wanted})
    targets = source_targets(config, sizes, _TEXT)
    assert {source.tokens for source in targets.values()} == {tokens}
    storage = storage_parts(config, sizes, overlay_size(sizes, config), targets)
    expected = sum(int(tokens * source.bytes_per_token) for source in targets.values())
    assert {part.name: part.size for part in storage}["targets"] == expected


def test_settings_that_do_not_fit_the_model_are_refused(
    micro_config: MakeConfig, sizes: ModelSizes, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"targets\.top_k=5000"):
        source_targets(micro_config(tmp_path, **{"targets.top_k": 5000}), sizes, {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["topk", "sampled"])
def test_head_and_encoding_allocate_what_is_planned(
    micro_config: MakeConfig,
    sizes: ModelSizes,
    most_allocated: Callable[[Callable[[], object]], int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    mode: str,
    dtype: str,
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 200 * _WIDE * 4})
    wide = dataclasses.replace(sizes, vocabulary=_WIDE)
    config = micro_config(tmp_path, **{"targets.mode": mode, "model.dtype": dtype, "targets.batch_sequences": 6})
    phases = precompute_phases(Worker.of(config, wide, _TEXT))
    planned = {part.name: part.size for part in phases[-1].parts}
    kind = getattr(torch, dtype)
    model = SimpleNamespace(head=torch.randn(_WIDE, 32).to(kind), fingerprint="base")
    header = SimpleNamespace(output=source_targets(config, wide, _TEXT)["prose"].output, base_fingerprint="base")
    teacher, hidden = EncodingTeacher(model, header), torch.randn(6 * 63, 32).to(kind)  # type: ignore[arg-type]
    measured = most_allocated(lambda: list(teacher._output(hidden, np.random.default_rng(0))))
    assert planned["logits of a chunk"] + planned["encoding"] == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scoring_a_text_for_the_service_allocates_what_is_planned(
    micro_config: MakeConfig,
    sizes: ModelSizes,
    most_allocated: Callable[[Callable[[], object]], int],
    tmp_path: Path,
    dtype: str,
) -> None:
    wide = dataclasses.replace(sizes, vocabulary=_WIDE)
    config = micro_config(
        tmp_path, **{"data.sequence_length": 1024, "evaluate.batch_sequences": 1, "model.dtype": dtype}
    )
    stages = {stage.stage: stage for stage in stage_needs(config, wide, {})}
    planned = {part.name: part.size for part in stages["serve"].phases[-1].parts}
    batch = Batch(np.ones((1, 1024), np.int32), np.array([1024], np.int32))
    logits = torch.zeros(1, 1024, _WIDE, dtype=getattr(torch, dtype))
    measured = logits.nbytes + most_allocated(lambda: sequence_nats(logits, batch))
    assert planned["logits"] + planned["cross-entropy"] == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("positions", [100, 1024, 4000])
def test_evaluating_allocates_what_is_planned(
    micro_config: MakeConfig,
    sizes: ModelSizes,
    most_allocated: Callable[[Callable[[], object]], int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    dtype: str,
    positions: int,
) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", positions * _WIDE * 4)
    wide = dataclasses.replace(sizes, vocabulary=_WIDE)
    config = micro_config(
        tmp_path, **{"data.sequence_length": 1024, "evaluate.batch_sequences": 1, "model.dtype": dtype}
    )
    stages = {stage.stage: stage for stage in stage_needs(config, wide, {})}
    planned = {part.name: part.size for part in stages["evaluate"].phases[-1].parts}["logits of a chunk"]
    hidden = torch.zeros(1024, 64, dtype=getattr(torch, dtype))
    weight, labels = torch.zeros(_WIDE, 64, dtype=hidden.dtype), torch.zeros(1024, dtype=torch.long)
    measured = most_allocated(lambda: position_nats(hidden, labels, weight))
    assert planned == pytest.approx(measured, rel=0.05)


def test_precomputing_holds_no_more_for_more_text_and_no_logits_for_hidden_states(
    micro_config: MakeConfig, sizes: ModelSizes, tmp_path: Path
) -> None:
    more = {name: dataclasses.replace(text, tokens=10**9) for name, text in _TEXT.items()}

    def peak(text: dict[str, SourceText], **settings: object) -> tuple[int, set[str]]:
        phases = precompute_phases(Worker.of(micro_config(tmp_path, **settings), sizes, text))
        return max(each.total for each in phases), {part.name for each in phases for part in each.parts}

    assert peak(_TEXT) == peak(more)
    assert "logits of a chunk" in peak(_TEXT)[1]
    assert "logits of a chunk" not in peak(_TEXT, **{"targets.mode": "hidden"})[1]
    assert precompute_phases(Worker.of(micro_config(tmp_path, **{"train.mode": "online"}), sizes, _TEXT)) == []
