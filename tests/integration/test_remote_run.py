"""The stages of a run whose directory is in an object store that keeps failing: the same bytes as on a disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from object_store import BUCKET, ObjectStore

from nexus_ray.cli import run_command
from nexus_ray.config import STAGES, Config
from nexus_ray.pipeline import Run, run_pipeline
from nexus_ray.router import candidates, collect
from nexus_ray.storage import Place, is_remote, local_directory, place_of
from nexus_ray.targets.writing import precompute

UNTIL = "precompute"
_TIMES = {"seconds", "finished"}  # of a stage, which its records and reports hold


def here(worker: Any, arguments: Any, items: Any, *_: Any, **__: Any) -> Iterator[Any]:
    """Workers of stages in this process."""
    call = worker(**arguments) if items else None
    for item in items:
        yield call(item)


Runs = tuple[Config, Config, int]


@contextmanager
def workers_here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (candidates, collect, precompute):
            patch.setattr(module, "map_over_pool", here)
        yield


@pytest.fixture(scope="module")
def local(make_micro_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run on this disk, undisturbed."""
    config = make_micro_config(tmp_path_factory.mktemp("runs") / "run")
    with workers_here():
        run_pipeline(config, last=UNTIL)
    return config


@pytest.fixture(scope="module", params=["workers here", pytest.param("workers of Ray", marks=pytest.mark.slow)])
def runs(
    request: pytest.FixtureRequest,
    local: Config,
    make_micro_config: Callable[..., Config],
    _object_store: ObjectStore,
) -> Runs:
    """Configurations of the run on this disk and of the same in the object store, and how often the store failed."""
    with_ray = request.param == "workers of Ray"
    if with_ray:
        request.getfixturevalue("ray_session")
    remote = make_micro_config(place_of(f"s3://{BUCKET}/runs-{int(with_ray)}/micro"))
    with _object_store.refusing_every(9), nullcontext() if with_ray else workers_here():
        run_pipeline(remote, last=UNTIL)
    failed = _object_store.failed
    _object_store.heal()
    return local, remote, failed


def files_of(directory: Path) -> dict[str, Path]:
    """But for those that tell when things happened."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    return {name: path for name, path in found.items() if not name.startswith("events")}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in _TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def test_the_store_failed_often_and_the_run_did_not(runs: Runs) -> None:
    assert runs[2] > 20


def test_every_artefact_has_the_bytes_that_it_has_on_a_disk(
    runs: Runs, object_store: ObjectStore, tmp_path: Path
) -> None:
    local, remote, _ = runs
    download(object_store, remote.run.directory, tmp_path)
    expected, found = files_of(Path(local.run.directory)), files_of(tmp_path)
    assert set(found) == {name for name in expected if not name.startswith(".")}
    for name, path in found.items():
        if name.endswith(".yaml") or name.startswith("stages/"):
            continue  # they say where the run is, and when
        if path.suffix == ".json":
            assert without_times(json.loads(path.read_text())) == without_times(json.loads(expected[name].read_text()))
        else:
            assert path.read_bytes() == expected[name].read_bytes(), name


def prefix_of(directory: Place) -> str:
    assert is_remote(directory)
    return directory.path.removeprefix(f"{BUCKET}/") + "/"


def download(store: ObjectStore, directory: Place, to: Path) -> None:
    """All objects as files, published directories as what is published there."""
    prefix = prefix_of(directory)
    names = {key.removeprefix(prefix) for key in store.keys(prefix)}
    published = {name.removesuffix("/published.json") for name in names if name.endswith("/published.json")}
    for name in published:
        shutil.copytree(local_directory(directory / name), to / name)
    for name in names:
        if not any(name.startswith(f"{place}/") for place in published):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            store.client().download_file(BUCKET, prefix + name, str(to / name))


def test_complete_stages_are_known_although_listings_lag(runs: Runs, object_store: ObjectStore) -> None:
    _, remote, _ = runs
    with object_store.empty_listings():
        assert all(Run(remote).is_complete(name) for name in STAGES[: STAGES.index(UNTIL) + 1])
        object_store.requests.clear()
        run_pipeline(remote, last=UNTIL)
    written = {request.path for request in object_store.requests if request.method == "PUT"}
    assert all(path.endswith("/.lock") or "/events" in path for path in written)


def test_a_stage_whose_artefact_is_gone_is_not_complete(runs: Runs, object_store: ObjectStore) -> None:
    _, remote, _ = runs
    run = Run(remote)
    shard = next(
        key for key in object_store.keys(prefix_of(remote.run.directory / "targets")) if key.endswith(".parquet")
    )
    content = object_store.client().get_object(Bucket=BUCKET, Key=shard)["Body"].read()
    object_store.client().delete_object(Bucket=BUCKET, Key=shard)
    try:
        assert not run.is_complete("precompute")
        assert run.is_complete("convert")
    finally:
        object_store.client().put_object(Bucket=BUCKET, Key=shard, Body=content)
    assert run.is_complete("precompute")


def test_commands_that_look_take_uris(
    runs: Runs, object_store: ObjectStore, capsys: pytest.CaptureFixture[str]
) -> None:
    _, remote, _ = runs
    assert run_command(["targets", "inspect", f"{remote.run.directory}/targets"]) == 0
    assert run_command(["checkpoint", "inspect", f"{remote.run.directory}/overlay-initial"]) == 0
    said = capsys.readouterr().out
    assert "every checksum fits" in said
    assert "overlay of" in said


def test_nothing_was_written_to_a_directory_called_s3(runs: Runs) -> None:
    assert not any(name.startswith("s3:") for name in os.listdir())  # noqa: PTH208
