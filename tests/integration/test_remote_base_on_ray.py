"""Workers on Ray with the base model in an object store make what they make from a local copy, and fetch it once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from object_store import BUCKET, ObjectStore

from nexus_ray.config import Config
from nexus_ray.layout import RunLayout
from nexus_ray.pipeline import run_pipeline
from nexus_ray.storage import sha256_file


@pytest.mark.slow
def test_statistics_are_the_same_bytes(
    finished: Config,
    object_store: ObjectStore,
    make_micro_config: Callable[..., Config],
    micro_model: Path,
    tmp_path: Path,
) -> None:
    for file in micro_model.iterdir():
        object_store.client().put_object(Bucket=BUCKET, Key=f"bases/micro/{file.name}", Body=file.read_bytes())
    config = make_micro_config(tmp_path / "run", **{"model.path": f"s3://{BUCKET}/bases/micro"})
    object_store.requests.clear()
    run_pipeline(config, last="collect")
    expected, found = (RunLayout(made.run.directory).router_stats for made in (finished, config))
    assert sha256_file(found) == sha256_file(expected)
    gets = [
        one for one in object_store.requests if one.path.endswith("/generation_config.json") and one.method == "GET"
    ]
    assert len(gets) == 2  # for the description that tokenises, and for the model that computes, by two workers
