"""Fixtures shared by all tests: a micro model, a random overlay for it, small texts and one Ray instance."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from object_store import BUCKET, ObjectStore, running_store
from transformers import AutoTokenizer, GptOssForCausalLM

from nexus_ray.checkpoints.fingerprint import fingerprint
from nexus_ray.checkpoints.overlay import OverlayConfig, save_overlay
from nexus_ray.checkpoints.quantised_export import export_mxfp4
from nexus_ray.checkpoints.reader import read_model_config
from nexus_ray.config import ArchitectureSection, Config, load_config
from nexus_ray.data.vocabulary import tokenizer_digest
from nexus_ray.families import family_of
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import activation, build_shared_experts
from nexus_ray.modeling.packed_experts import ExpertNorms
from nexus_ray.pretraining.model import build_config
from nexus_ray.router import candidates, collect
from nexus_ray.router.accumulate import moments_of_logits
from nexus_ray.router.artefact import Description, RouterStatistics
from nexus_ray.router.moments import RouterMoments
from nexus_ray.selection.selection import Selection, select
from nexus_ray.storage import Place, place_of, write_text

ASSETS = Path(__file__).parents[1] / "assets"
MICRO = ArchitectureSection(
    layers=2,
    hidden_size=64,
    intermediate_size=64,
    experts=8,
    experts_per_token=2,
    attention_heads=2,
    key_value_heads=1,
)


@pytest.hookimpl(tryfirst=True)  # before pytest itself looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts Ray, and what ends some of it untimely: `make test` runs each in a process of its own."""
    for item in items:
        if item.path.name.startswith("test_killed_"):
            item.add_marker("kills")
        if "ray_session" in getattr(item, "fixturenames", ()) or "integration" in item.path.parts:
            item.add_marker("ray")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_directory() -> Path:
    return ASSETS / "tiny-gpt-oss"


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_directory: Path) -> Path:
    """A 2-layer GPT-OSS model with random weights and MXFP4 experts."""
    path = tmp_path_factory.mktemp("models") / "micro"
    torch.manual_seed(0)
    config = build_config(MICRO, AutoTokenizer.from_pretrained(tokenizer_directory))
    config.initializer_range = 0.2
    model = GptOssForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    export_mxfp4(model, tokenizer_directory, path)
    return path


@pytest.fixture(scope="session")
def _object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An S3 server, and an environment in which this process and those that it starts use it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with running_store() as store, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NEXUS_RAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield store


@pytest.fixture
def object_store(_object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An S3 server on loopback without faults, asked again soon; a test that uses Ray takes `ray_session` besides."""
    monkeypatch.setattr("nexus_ray.storage.retries.LONGEST_WAIT", 0.2)
    yield _object_store
    _object_store.heal()


@pytest.fixture
def remote(object_store: ObjectStore) -> Place:
    """A place in the object store that no other test uses."""
    return place_of(f"s3://{BUCKET}/{uuid.uuid4().hex}")


WriteOverlay = Callable[..., Path]


@pytest.fixture(scope="session")
def write_overlay() -> WriteOverlay:
    """Writes an overlay for a base into a directory; see `_write_overlay`."""
    return _write_overlay


def _write_overlay(
    base: Path, path: Path, *, width: int, std: float, token_gate: bool = False, scale: float = 1.0, seed: int = 0
) -> Path:
    """Every tensor is random, with this standard deviation; 0: the student is the base."""
    config = read_model_config(base)
    family = family_of(config)
    sizes = family.dimensions(config)
    description = OverlayConfig(
        base_fingerprint=fingerprint(base),
        model_type=str(config["model_type"]),
        layers=sizes.layers,
        hidden_size=sizes.hidden_size,
        width=width,
        token_gate=token_gate,
        scale=scale,
        learn_scale=False,
        initialisation="random",
        dtype="float32",
    )
    experts = build_shared_experts(description, activation(family, config))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * std if "scale" not in name else tensor
        for name, tensor in experts.state_dict().items()
    }
    save_overlay(path, description, tensors)
    return path


@pytest.fixture(scope="session")
def micro_overlay(tmp_path_factory: pytest.TempPathFactory, micro_model: Path, write_overlay: WriteOverlay) -> Path:
    """An overlay for the micro model in which every tensor matters."""
    path = tmp_path_factory.mktemp("overlays") / "random"
    return write_overlay(micro_model, path, width=64, std=0.2, token_gate=True, scale=0.5, seed=1)


def _sentences(words: str, count: int) -> str:
    vocabulary = words.split()
    return " ".join(vocabulary[(i * i + i // 7) % len(vocabulary)] for i in range(count)) + "."


_TEXTS = {
    "play": "thou art the king and I thy servant speak good sir or be silent in this night of sorrow",
    "prose": "the government of the people shall report to congress about commerce peace and the budget",
}


@pytest.fixture(scope="session")
def micro_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with {play,prose}.{train,heldout}.jsonl."""
    directory = tmp_path_factory.mktemp("texts")
    for name, words in _TEXTS.items():
        for split, documents, length in (("train", 12, 300), ("heldout", 4, 120)):
            rows = [{"text": _sentences(words, length + 13 * i)} for i in range(documents)]
            (directory / f"{name}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(scope="session")
def make_micro_config(
    micro_model: Path, micro_texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Config]:
    """A function (run_directory, **{"dotted.field": value}) -> Config of a run that takes seconds a stage."""

    def make(run_directory: Path, **overrides: object) -> Config:
        sources = "".join(
            f"    {name}: {{train: {micro_texts}/{name}.train.jsonl, heldout: {micro_texts}/{name}.heldout.jsonl, "
            f"role: {role}}}\n"
            for name, role in (("play", "domain"), ("prose", "retention"))
        )
        path = tmp_path_factory.mktemp("config") / "micro.yaml"
        write_text(path, _MICRO_YAML.format(run=run_directory, model=micro_model, sources=sources))
        return load_config(path, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])

    return make


@pytest.fixture
def micro_config(make_micro_config: Callable[..., Config]) -> Callable[..., Config]:
    """The same function, for tests that need it once."""
    return make_micro_config


_MICRO_YAML = """
run: {{directory: {run}}}
model: {{path: {model}}}
data:
  sequence_length: 64
  shard_bytes: 4096
  sources:
{sources}
collect: {{tokens: 4096, batch_sequences: 4}}
select: {{top_k: 4}}
targets: {{top_k: 16, batch_sequences: 4}}
train:
  steps: 6
  sources:
    play: {{sequences_per_step: 4, cross_entropy: 1.0}}
    prose: {{sequences_per_step: 4, output_kl: 2.0}}
  micro_batch_sequences: 2
  validation_sequences: 4
  validate_every: 3
  checkpoint_every: 2
evaluate: {{batch_sequences: 4}}
"""


@pytest.fixture(scope="session")
def ray_session(_object_store: ObjectStore) -> Iterator[None]:
    """One Ray instance for all tests; its workers know the object store, which is why that starts first."""
    import ray

    from nexus_ray.cluster import ensure_ray

    ensure_ray()
    yield
    ray.shutdown()


LAYERS, EXPERTS, TOP_K, SEQUENCES, LENGTH = 2, 8, 2, 8, 64  # of the micro model, and of random statistics for it


def _moments(seed: int, *, with_norms: bool) -> RouterMoments:
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(LAYERS, EXPERTS, generator=generator)
    logits = torch.randn(SEQUENCES, LENGTH, LAYERS, EXPERTS, generator=generator) + bias
    valid = np.ones((SEQUENCES, LENGTH), bool)
    norms = []
    for layer in range(LAYERS):
        top = logits[:, :, layer].flatten(0, 1).topk(TOP_K)
        size = torch.randperm(EXPERTS, generator=generator)[top.indices] + 1.0
        norms.append(ExpertNorms(top.indices, size * top.values.softmax(dim=-1)))
    return moments_of_logits(logits, valid, np.arange(SEQUENCES) % 2, TOP_K, norms if with_norms else ())


@pytest.fixture
def ranked_run(
    make_micro_config: Callable[..., Config], micro_model: Path, tmp_path: Path
) -> Callable[..., tuple[Config, RunLayout, Selection]]:
    """A function (with_norms=True, **overrides) -> (config, layout, selection) of a run ready for `convert`.

    The statistics are of random router logits; everything after them is the real thing.
    """

    def make(*, with_norms: bool = True, **overrides: object) -> tuple[Config, RunLayout, Selection]:
        config = make_micro_config(tmp_path / "run", **overrides)
        layout = RunLayout(config.run.directory)
        sources = {name: _moments(seed, with_norms=with_norms) for seed, name in enumerate(config.data.sources)}
        description = Description(
            base_fingerprint=fingerprint(micro_model),
            tokenizer_sha256=tokenizer_digest(AutoTokenizer.from_pretrained(micro_model)),
            sequence_length=LENGTH,
            layers=LAYERS,
            experts=EXPERTS,
            experts_per_token=TOP_K,
            tokens={name: moments.tokens for name, moments in sources.items()},
        )
        RouterStatistics(description, sources).save(layout.router_stats)
        return config, layout, select(config, layout)

    return make


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run the workers of `collect` here instead of on Ray, last item first; the rows they were called with."""
    calls: list[dict[str, Any]] = []

    def run(worker: Any, arguments: Any, items: Any, resources: Any, description: str, amount: Any = None) -> Any:
        instance = worker(**arguments) if items else None
        for row in reversed(items):
            calls.append(row)
            yield instance(row)

    for module in (candidates, collect):
        monkeypatch.setattr(module, "map_over_pool", run)
    return calls
