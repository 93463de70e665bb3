"""The whole pipeline of a run whose directory is in an object store that keeps failing: the same bytes as on a disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from object_store import BUCKET, ObjectStore

from nexus_ray.cli import run_command
from nexus_ray.config import STAGES, Config
from nexus_ray.pipeline import Run, run_pipeline
from nexus_ray.storage import Place, is_remote, local_directory, place_of

_TIMES = {"seconds", "finished"}  # of a stage, which its records and reports hold


Runs = tuple[Config, Config, int]


@pytest.fixture(scope="module")
def runs(finished: Config, make_micro_config: Callable[..., Config], _object_store: ObjectStore) -> Runs:
    """Configurations of the run on this disk and of the same in the object store, and how often the store failed."""
    remote = make_micro_config(place_of(f"s3://{BUCKET}/runs/micro"))
    with _object_store.refusing_every(9):
        run_pipeline(remote)
    failed = _object_store.failed
    _object_store.heal()
    return finished, remote, failed


def files_of(directory: Path) -> dict[str, Path]:
    """But for those that tell when things happened, and where."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    apart = ("events", "tensorboard/", "training/", "config.yaml", "checkpoints/kept.json", ".")
    return {name: path for name, path in found.items() if not name.startswith(apart)}


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
    assert set(found) == set(expected)
    assert {"overlay/overlay.safetensors", "best/state.safetensors", "plots/training.png"} <= set(found)
    for name, path in found.items():
        if name == "report.json":
            assert json.loads(path.read_text())["evaluation"] == json.loads(expected[name].read_text())["evaluation"]
        elif name == "metrics.jsonl":
            assert steps(path) == steps(expected[name])
        elif path.suffix == ".json" and not name.startswith("stages/"):
            assert without_times(json.loads(path.read_text())) == without_times(json.loads(expected[name].read_text()))
        elif name not in ("report.md", "plots/training.png") and not name.startswith("stages/"):  # these show times
            assert path.read_bytes() == expected[name].read_bytes(), name


def steps(metrics: Path) -> list[tuple[Any, ...]]:
    """But for checkpoints, which a store has later than a disk, while training goes on."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    told = ("event", "step", "loss", "sources", "gradient_norm", "router")
    return [tuple(record.get(key) for key in told) for record in records if record["event"] != "checkpoint"]


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
        assert all(Run(remote).is_complete(name) for name in STAGES)
        object_store.requests.clear()
        run_pipeline(remote)
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
