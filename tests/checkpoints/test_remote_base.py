"""A base model in an object store is the same base: same identity, same logits, same recipes, and few bytes read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints.counting_store import CountingStore
from rich.console import Console

from nexus_ray.checkpoints import cache_contents
from nexus_ray.checkpoints.cache_entry import Entry, entries
from nexus_ray.checkpoints.fingerprint import fingerprint, full_sha256
from nexus_ray.checkpoints.inspect import describe, identity
from nexus_ray.checkpoints.node_cache import local_description, local_model
from nexus_ray.cli import run_command
from nexus_ray.config import STAGES, Config, ModelSection
from nexus_ray.conversion.initialise import convert
from nexus_ray.errors import ConfigError, StorageError
from nexus_ray.huggingface.export import export
from nexus_ray.layout import RunLayout
from nexus_ray.modeling.loading import load_base
from nexus_ray.modeling.packed_experts import PackedExperts
from nexus_ray.pipeline import Run
from nexus_ray.planning.plan import make_plan
from nexus_ray.planning.tables import show_plan
from nexus_ray.router import candidates, collect
from nexus_ray.storage import place_of, sha256_file
from nexus_ray.targets.writing.job import job_of_run

WEIGHTS = "model.safetensors"


def _with_base(config: Config, uri: str) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"path": place_of(uri)})})


def _whole_entries() -> list[Entry]:
    return [entry for entry in entries() if (entry.files / WEIGHTS).exists()]


def _text(renderable: Any) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_identity_and_description_are_those_of_a_local_copy(
    store: CountingStore, remote_model: str, micro_model: Path
) -> None:
    assert fingerprint(remote_model) == fingerprint(micro_model)
    assert full_sha256(remote_model) == full_sha256(micro_model)
    assert identity(remote_model, sha256=True) == identity(micro_model, sha256=True)
    local, remote = _text(describe(micro_model)), _text(describe(remote_model))
    assert remote[remote.index("┏") :] == local[local.index("┏") :]  # below the title
    assert not entries()


def test_the_fingerprint_is_asked_for_again_only_when_the_model_has_changed(
    store: CountingStore, micro_model: Path, tokenizer_directory: Path
) -> None:
    uri = store.put(micro_model, "changing/model")
    fingerprint(uri)
    store.requests.clear()
    assert fingerprint(uri) == fingerprint(micro_model)
    assert len(store.requests) < 12
    store.put(tokenizer_directory, "changing/model")
    assert fingerprint(uri) == fingerprint(tokenizer_directory)


@pytest.mark.parametrize("experts", ["packed", "eager"])
def test_a_model_from_the_cache_computes_the_same_bits(
    store: CountingStore, remote_model: str, micro_model: Path, experts: str
) -> None:
    ids = torch.arange(5, 37)[None]
    local = load_base(ModelSection(path=micro_model, device="cpu", experts=experts))
    remote = load_base(ModelSection(path=remote_model, device="cpu", experts=experts))
    assert remote.fingerprint == local.fingerprint
    with torch.no_grad():
        assert torch.equal(remote.model(ids).logits, local.model(ids).logits)
    assert remote.tokenizer.encode("a text") == local.tokenizer.encode("a text")


def test_packed_experts_are_views_of_the_cached_file(store: CountingStore, remote_model: str) -> None:
    """So that the workers of a node share its pages."""
    loaded = load_base(ModelSection(path=remote_model, device="cpu"))
    file = _whole_entries()[0].files / WEIGHTS
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    experts = next(module for module in loaded.model.modules() if isinstance(module, PackedExperts))
    blocks = next(tensor for tensor in experts.parameters() if tensor.dtype == torch.uint8)
    assert any(start <= blocks.data_ptr() < stop for start, stop in ranges)


def test_recipes_do_not_say_where_the_base_is(
    store: CountingStore, remote_model: str, make_micro_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_micro_config(tmp_path / "run")
    local, remote = Run(config), Run(_with_base(config, remote_model))
    assert {name: local.recipe(name) for name in STAGES} == {name: remote.recipe(name) for name in STAGES}
    assert not _whole_entries()


def test_conversion_reads_the_experts_that_it_needs_and_makes_the_same_overlay(
    store: CountingStore, remote_model: str, ranked_run: Callable[..., Any], micro_model: Path
) -> None:
    config, layout, _ = ranked_run()
    convert(config, layout)
    before = sha256_file(layout.initial_overlay / "overlay.safetensors")
    store.requests.clear()
    convert(_with_base(config, remote_model), layout)
    assert sha256_file(layout.initial_overlay / "overlay.safetensors") == before
    assert not _whole_entries()


class _WorkersBegin(Exception):  # noqa: N818
    """What comes next loads the model."""


def test_the_driver_of_a_collection_downloads_no_weights(
    store: CountingStore,
    tokenizer_directory: Path,
    make_micro_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(worker: Any, arguments: Any, items: Any, *_: Any, **__: Any) -> Any:
        instance = worker(**arguments)
        return (instance(item) for item in items)

    def begin(*_: Any, **__: Any) -> Any:
        raise _WorkersBegin

    monkeypatch.setattr(candidates, "map_over_pool", read)
    monkeypatch.setattr(collect, "map_over_pool", begin)
    uri = store.put(tokenizer_directory, "driver/tiny-gpt-oss")
    config = _with_base(make_micro_config(tmp_path / "run"), uri)
    with pytest.raises(_WorkersBegin):
        collect.collect(config, RunLayout(config.run.directory))
    job_of_run(config)
    assert not _whole_entries()
    size = (tokenizer_directory / WEIGHTS).stat().st_size
    assert 0 < store.got(WEIGHTS) < size / 10  # samples of tensors, headers


def test_a_plan_says_what_the_cache_will_take(
    store: CountingStore, remote_model: str, make_micro_config: Callable[..., Config], tmp_path: Path, micro_model: Path
) -> None:
    config = make_micro_config(tmp_path / "run")
    assert make_plan(config).base_cache is None
    planned = make_plan(_with_base(config, remote_model))
    assert planned.base_cache is not None
    assert planned.base_cache.size == (micro_model / WEIGHTS).stat().st_size
    assert planned.base_cache.missing == sum(path.stat().st_size for path in micro_model.iterdir())
    assert planned.base_cache.directory == os.environ["NEXUS_RAY_CACHE"]
    assert "base, on each node" in _text(show_plan(planned))
    assert not _whole_entries()
    local_model(place_of(remote_model))
    assert make_plan(_with_base(config, remote_model)).as_dict()["base_cache"]["missing"] == 0


def test_an_export_links_the_cached_files_and_outlives_them(
    store: CountingStore, remote_model: str, micro_model: Path, micro_overlay: Path, tmp_path: Path
) -> None:
    done = export(place_of(remote_model), micro_overlay, tmp_path / "export")
    shard = tmp_path / "export" / "model-base.safetensors"
    cached = _whole_entries()[0].files / WEIGHTS
    assert done.copied_bytes == 0
    assert shard.samefile(cached)
    cached.unlink()
    assert sha256_file(shard) == sha256_file(micro_model / WEIGHTS)
    assert "micro" in (tmp_path / "export" / "README.md").read_text()


def test_inspect_takes_a_uri(store: CountingStore, remote_model: str, micro_model: Path, capsys: Any) -> None:
    assert run_command(["checkpoint", "inspect", remote_model]) == 0
    assert fingerprint(micro_model) in capsys.readouterr().out


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Ends this process's use of its entries, as its end would."""
    held: dict[Path, Any] = {}
    monkeypatch.setattr("nexus_ray.checkpoints.cache_entry._held", held)

    def release() -> None:
        for use in held.values():
            use.release()
        held.clear()

    return release


def test_the_cache_is_shown_and_cleared_by_name(
    store: CountingStore, remote_model: str, released: Callable[[], None], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    place = place_of(remote_model)
    whole, description = local_model(place).parent, local_description(place).parent
    assert run_command(["cache"]) == 0
    shown = _text(cache_contents.contents())
    assert whole.name in shown
    assert remote_model in "".join(shown.split())
    with pytest.raises(StorageError, match="a process of this node uses it"):
        cache_contents.clear([whole.name])
    released()
    assert run_command(["cache", "clear", "nothing"]) == 2
    assert whole.exists()
    assert run_command(["cache", "clear", whole.name]) == 0
    assert not whole.exists()
    assert description.exists()
    assert "removed" in capsys.readouterr().out
    assert run_command(["cache", "clear"]) == 2


def test_room_is_made_by_removing_what_was_used_least_recently(
    store: CountingStore, micro_model: Path, released: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    directories = [local_model(place_of(store.put(micro_model, f"room-{number}/micro"))) for number in range(3)]
    for age, directory in enumerate(directories):
        os.utime(directory, (time.time() - 100 * age,) * 2)
    released()
    kept = Entry(directories[2].parent.name)
    kept.hold()  # the least recent one is in use
    monkeypatch.setattr(cache_contents, "_free_gigabytes", lambda: 5.0 + sum(not path.exists() for path in directories))
    lines = cache_contents.make_room(6)
    assert [path.exists() for path in directories] == [True, False, True]
    assert "uses it" in lines[0]
    with pytest.raises(StorageError, match=r"7\.00 GB are free"):
        cache_contents.make_room(8)
    assert kept.files.exists()


def test_a_name_that_is_not_there(store: CountingStore) -> None:
    with pytest.raises(ConfigError, match="has no entry 'other'"):
        cache_contents.clear(["other"])
